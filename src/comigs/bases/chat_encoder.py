"""This module makes tokens of chats, and says which of them are the assistant's.

The template is rendered turn by turn. What it adds for an answer, after the words that ask for one,
is that answer; so it must only ever add to what it wrote before. Nothing is asked of the template
itself: those without `{% generation %}` give an all-zero mask.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from comigs.bases.chat_template import LEARNT_ON, Message, TemplateRefusal, render
from comigs.errors import UserError

FORMAT = 1  # of what is marked; part of the id


class ChatEncoder:
    """A chat encoder is a tokenizer with a chat template, as data/corpus.py's ChatEncoder.

    longest: tokens that the model reads at once. rows: of its embedding. ends: the tokens that end
    an answer, which is learnt with the first of them and no further.
    """

    def __init__(
        self, name: str, tokenizer: Any, longest: int, rows: int, ends: frozenset[int]
    ) -> None:
        self.name, self.tokenizer = name, tokenizer
        self.longest, self.rows, self.ends = longest, rows, ends

    @property
    def id(self) -> str:
        """A hash of the template and of what ends an answer."""
        made_from = [FORMAT, self.tokenizer.chat_template, sorted(self.ends)]
        return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()

    @property
    def vocabulary_size(self) -> int:
        """A number above all ids, special ones too."""
        return self.rows

    def encode(
        self, turns: Sequence[tuple[str, str]], where: str
    ) -> tuple[list[int], list[bool], list[int]]:
        """Return a chat's tokens: ids, whether each is learnt, and the bytes that each stands for.

        Raises UserError, naming the place, where there cannot be any.
        """
        # The template makes one text of the turns, which is cut into tokens as a whole.
        self._require_plain_words(turns, where)
        messages: list[Message] = [{"role": role, "content": words} for role, words in turns]
        text, answers = self._rendered(messages, where)
        encoded = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids, spans = encoded["input_ids"], encoded["offset_mapping"]
        # What the model cannot read is refused before it is learnt from.
        if len(ids) > self.longest:
            raise UserError(
                f"{where}: has {len(ids):,} tokens, but base {self.name} reads at most "
                f"{self.longest:,}; make it shorter"
            )
        if max(ids) >= self.rows:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise UserError(f'{where}: base {self.name} does not read "{token}" of its template')
        learnt = self._learnt(ids, spans, answers)
        return ids, learnt, self._bytes(text, ids, spans, answers)

    def prompt(self, turns: Sequence[tuple[str, str]], where: str) -> list[int]:
        """Return the tokens of these turns, after which an answer comes.

        Raises UserError, naming the place, where there cannot be any.
        """
        self._require_plain_words(turns, where)
        messages: list[Message] = [{"role": role, "content": words} for role, words in turns]
        try:
            text = render(self.tokenizer, messages, prompt=True, day=LEARNT_ON)
        except TemplateRefusal as error:
            raise self._refusal(error, where) from None
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return ids as text, with the template's own tokens."""
        text: str = self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        return text

    @cached_property
    def _special(self) -> dict[int, str]:
        added = self.tokenizer.added_tokens_decoder
        return {id: str(token) for id, token in added.items() if token.special}

    def _require_plain_words(self, turns: Sequence[tuple[str, str]], where: str) -> None:
        """Refuse words that would be read as the template's own. Raises UserError."""
        if not self.tokenizer.chat_template:
            raise UserError(
                f"{where}: is a chat, but base {self.name} has no chat template; give one as "
                "base.chat_template (docs/data.md), or the text as plain text"
            )
        for role, words in turns:
            for token in self._special.values():
                if token in words:
                    raise UserError(
                        f'{where}: a turn ({role}) holds "{token}", which base {self.name} reads '
                        "as the end or start of something; take it out"
                    )

    def _rendered(
        self, messages: Sequence[Message], where: str
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return a chat as one text, and where in it each answer begins and ends.

        Raises UserError where the template fails, or changes what it wrote before.
        """
        # An answer is what is added to the words that ask for it.
        answers = []
        try:
            whole = render(self.tokenizer, messages, prompt=False, day=LEARNT_ON)
            for number, message in enumerate(messages):
                if message["role"] != "assistant":
                    continue
                before = render(self.tokenizer, messages[:number], prompt=True, day=LEARNT_ON)
                after = whole
                if number + 1 < len(messages):
                    until = messages[: number + 1]
                    after = render(self.tokenizer, until, prompt=False, day=LEARNT_ON)
                if not (whole.startswith(after) and after.startswith(before)):
                    raise UserError(
                        f"{where}: turn {number + 1} ({message['role']}): the chat template of "
                        f"base {self.name} does not only add to what it wrote of the turns before, "
                        "so what of it is the answer is not known; give another base.chat_template"
                    )
                answers.append((len(before), len(after)))
        except TemplateRefusal as error:
            raise self._refusal(error, where) from None
        return whole, answers

    def _refusal(self, error: TemplateRefusal, where: str) -> UserError:
        return UserError(f"{where}: the chat template of base {self.name} refuses it: {error}")

    def _learnt(
        self, ids: list[int], spans: list[tuple[int, int]], answers: list[tuple[int, int]]
    ) -> list[bool]:
        """Return whether each token is of an answer, up to the first token that ends it."""
        learnt = [False] * len(ids)
        starts = [start for start, _ in spans]
        for begin, end in answers:
            # A token that reaches into an answer is the answer's, as one with a space before it.
            first = bisect_right(starts, begin)
            while first and spans[first - 1][1] > begin:
                first -= 1
            for place in range(first, len(ids)):
                if starts[place] >= end:
                    break
                learnt[place] = True
                if ids[place] in self.ends:
                    break
        return learnt

    def _bytes(
        self,
        text: str,
        ids: list[int],
        spans: list[tuple[int, int]],
        answers: list[tuple[int, int]],
    ) -> list[int]:
        """Return the bytes of text that each token stands for; a special one stands for none.

        A character of several tokens counts with the first, and what no token covers with the next.
        """
        counts, done = [0], 0
        begins = [begin for begin, _ in answers]
        for id, (_, end) in zip(ids, spans, strict=True):
            # What a token has of the words before an answer is not the answer's.
            if begins and end > begins[0]:
                begin = begins.pop(0)
                counts[-1] += len(text[done:begin].encode())
                done = max(done, begin)
            counts.append(0 if id in self._special else len(text[done:end].encode()))
            done = max(done, end)
        return counts[1:]
