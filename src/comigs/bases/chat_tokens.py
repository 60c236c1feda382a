"""This module cuts chats into tokens, as their template writes them: for learning and for writing.

What stands before an answer, and each answer, is cut for itself. Where a text is cut as a whole,
tokens reach over that border, and what a model reads before it answers is nothing that it learnt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import date
from functools import cached_property
from typing import Any, NamedTuple

from comigs.bases.chat_template import Message, TemplateRefusal, render

ANSWER = "\ue000"  # a character of no language, which no template writes by itself
PROBES: tuple[list[Message], ...] = (
    [{"role": "user", "content": "?"}, {"role": "assistant", "content": ANSWER}],
    [
        {"role": "system", "content": "!"},
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": ANSWER},
    ],
)
MOST = 200  # answers of a chat that is only read; each is rendered with all that stands before it


class Stretch(NamedTuple):
    """A stretch is a part of a chat's text: the answer of turn number `turn`, or what is between
    answers (None).
    """

    text: str
    turn: int | None = None


class TurnChanged(Exception):
    """A template does not only add to what it wrote before turn number `turn`."""

    def __init__(self, turn: int) -> None:
        super().__init__(turn)
        self.turn = turn


def stretches(
    tokenizer: Any, messages: Sequence[Message], prompt: bool, day: date | None = None
) -> list[Stretch]:
    """Return a chat's text, cut where answers begin and end. prompt and day: as `render` has them.

    Raises TemplateRefusal, and TurnChanged where it is not known what of the text an answer is.
    """
    # An answer is what is added to the words that ask for it.
    whole, done = render(tokenizer, messages, prompt, day), 0
    found = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:turn], True, day)
        after = whole
        if prompt or turn + 1 < len(messages):
            after = render(tokenizer, messages[: turn + 1], False, day)
        if not (whole.startswith(after) and after.startswith(before)) or len(before) < done:
            raise TurnChanged(turn)
        found.append(Stretch(whole[done : len(before)]))
        found.append(Stretch(after[len(before) :], turn))
        done = len(after)
    return [*found, Stretch(whole[done:])]


def prompt_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Return the tokens after which the assistant's next words come, today. Raises TemplateRefusal.

    They are those that were learnt, where it is known what of the text the answers are.
    """
    answers = sum(message["role"] == "assistant" for message in messages)
    try:
        if answers > MOST:
            raise TurnChanged(0)
        found = stretches(tokenizer, messages, prompt=True)
    except (TurnChanged, TemplateRefusal):
        found = [Stretch(render(tokenizer, messages, prompt=True))]
    tokens = TemplateTokens(tokenizer)
    return [id for stretch in found for id in tokens.cut(stretch.text)[0]]


class TemplateTokens:
    """The tokens of a chat template: which special ones are its own, and how its text is cut."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def special(self) -> dict[int, str]:
        """All special tokens of the tokenizer by id."""
        added = self.tokenizer.added_tokens_decoder
        return {id: str(token) for id, token in added.items() if token.special}

    @cached_property
    def own(self) -> frozenset[str]:
        """The special tokens that the template names or writes; words hold none of them."""
        text = "\n".join([str(self.tokenizer.chat_template), *self._probed()])
        return frozenset(token for token in self.special.values() if token in text)

    @cached_property
    def end(self) -> int | None:
        """The first special token that the template writes behind an answer; None: it has none."""
        for text in self._probed():
            if ANSWER in text:
                behind = text.rpartition(ANSWER)[2]
                for id in self._encoded(behind)[0]:
                    if id in self.special:
                        return id
        return None

    def cut(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the tokens of a stretch, and from where to where in it each one stands.

        A special token that is none of the template's own stands in somebody's words, and is words.
        """
        if not any(token in text for token in self._others):
            return self._encoded(text)
        # The library reads special tokens as words everywhere in a text or nowhere in it.
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        borders = "|".join(map(re.escape, sorted(self.own, key=len, reverse=True)))
        start = 0
        for part in re.split(f"({borders})", text) if borders else [text]:
            own_ids, own_spans = self._encoded(part, as_words=part not in self.own)
            ids += own_ids
            spans += [(start + first, start + end) for first, end in own_spans]
            start += len(part)
        return ids, spans

    @cached_property
    def _others(self) -> frozenset[str]:
        return frozenset(self.special.values()) - self.own

    def _probed(self) -> list[str]:
        """Return what the template makes of short chats, where it takes them."""
        texts = []
        for messages in PROBES:
            for chat, prompt in ((messages, False), (messages[:-1], True)):
                try:
                    texts.append(render(self.tokenizer, chat, prompt))
                except TemplateRefusal:
                    continue
        return texts

    def _encoded(
        self, text: str, as_words: bool = False
    ) -> tuple[list[int], list[tuple[int, int]]]:
        encoded = self.tokenizer(
            text,
            add_special_tokens=False,
            split_special_tokens=as_words,
            return_offsets_mapping=True,
            verbose=False,
        )
        return encoded["input_ids"], encoded["offset_mapping"]
