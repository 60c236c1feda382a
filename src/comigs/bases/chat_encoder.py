"""This module makes tokens of chats, and says which of them are the assistant's.

The template is rendered turn by turn. What it adds for an answer, after the words that ask for one,
is that answer; so it must only ever add to what it wrote before. Nothing is asked of the template
itself: those without `{% generation %}` give an all-zero mask. What is before an answer and the
answer are cut into tokens apart, so that a prompt is always the beginning of what is learnt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from comigs.bases.chat_template import LEARNT_ON, Message, TemplateRefusal
from comigs.bases.chat_tokens import Stretch, TemplateTokens, TurnChanged, stretches
from comigs.errors import UserError

FORMAT = 2  # of how chats are cut and marked; part of the id


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
        # Each stretch is cut into tokens for itself; only answers are learnt.
        ids: list[int] = []
        learnt: list[bool] = []
        num_bytes: list[int] = []
        for stretch in self._stretches(turns, where, prompt=False):
            own, spans = self._tokens.cut(stretch.text)
            ids += own
            num_bytes += self._bytes(stretch.text, own, spans)
            if stretch.turn is None:
                learnt += [False] * len(own)
                continue
            self._require_answer(stretch, own, turns[stretch.turn][1], where)
            end = next(place for place, id in enumerate(own) if id in self.ends)
            learnt += [place <= end for place in range(len(own))]
        # What the model cannot read is refused before it is learnt from.
        if len(ids) > self.longest:
            raise UserError(
                f"{where}: has {len(ids):,} tokens, but base {self.name} reads at most "
                f"{self.longest:,}; make it shorter"
            )
        if max(ids) >= self.rows:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise UserError(f'{where}: base {self.name} does not read "{token}" of its template')
        return ids, learnt, num_bytes

    def prompt(self, turns: Sequence[tuple[str, str]], where: str) -> list[int]:
        """Return the tokens of these turns, after which an answer comes.

        Raises UserError, naming the place, where there cannot be any.
        """
        found = self._stretches(turns, where, prompt=True)
        return [id for stretch in found for id in self._tokens.cut(stretch.text)[0]]

    def decode(self, ids: Sequence[int]) -> str:
        """Return ids as text, with the template's own tokens."""
        text: str = self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        return text

    @cached_property
    def _tokens(self) -> TemplateTokens:
        return TemplateTokens(self.tokenizer)

    @cached_property
    def _forbidden(self) -> list[str]:
        """The special tokens that would be read as the template's own, or as an answer's end."""
        tokens = self._tokens
        ends = {token for id, token in tokens.special.items() if id in self.ends}
        return sorted(tokens.own | ends)

    def _stretches(
        self, turns: Sequence[tuple[str, str]], where: str, prompt: bool
    ) -> list[Stretch]:
        """Return a chat's text, cut where answers begin and end. Raises UserError."""
        # Words that would be read as the template's own are refused first.
        if not self.tokenizer.chat_template:
            raise UserError(
                f"{where}: is a chat, but base {self.name} has no chat template; give one "
                '(base.chat_template = "plain" does for any base; docs/data.md), or the text as '
                "plain text"
            )
        for role, words in turns:
            for token in self._forbidden:
                if token in words:
                    raise UserError(
                        f'{where}: a turn ({role}) holds "{token}", which base {self.name} reads '
                        "as the end or start of something; take it out"
                    )
        messages: list[Message] = [{"role": role, "content": words} for role, words in turns]
        try:
            return stretches(self.tokenizer, messages, prompt, LEARNT_ON)
        except TemplateRefusal as error:
            raise UserError(
                f"{where}: the chat template of base {self.name} refuses it: {error}"
            ) from None
        except TurnChanged as changed:
            raise UserError(
                f"{where}: turn {changed.turn + 1} (assistant): the chat template of base "
                f"{self.name} does not only add to what it wrote of the turns before, so what of "
                "it is the answer is not known; give another base.chat_template "
                f'("{self._another()}" is one; docs/data.md)'
            ) from None

    def _another(self) -> str:
        """Return the name of a template of ours that this base can read."""
        return "chatml" if "<|im_end|>" in self._tokens.special.values() else "plain"

    def _require_answer(self, stretch: Stretch, ids: list[int], words: str, where: str) -> None:
        """Refuse an answer that a template does not write, or does not end. Raises UserError."""
        assert stretch.turn is not None
        turn = f"turn {stretch.turn + 1} (assistant): the chat template of base {self.name}"
        # Templates take white space off words, and what was thought before them; never their end.
        if words.split()[-1] not in stretch.text:
            raise UserError(
                f"{where}: {turn} does not write its words; give another base.chat_template"
            )
        if self.ends.isdisjoint(ids):
            raise UserError(
                f"{where}: {turn} writes no token that ends it, so a model would never learn to "
                "stop; add {{ eos_token }} behind an answer's words in base.chat_template"
            )

    def _bytes(self, text: str, ids: list[int], spans: list[tuple[int, int]]) -> list[int]:
        """Return the bytes of text that each token stands for; a special one stands for none.

        A character of several tokens counts with the first, and what no token covers with the next.
        """
        counts, done = [], 0
        for id, (_, end) in zip(ids, spans, strict=True):
            counts.append(0 if id in self._tokens.special else len(text[done:end].encode()))
            done = max(done, end)
        return counts
