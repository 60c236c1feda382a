"""This module shows what clients train on as the model reads it, with what is learnt marked, and
what models answered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from typing import TYPE_CHECKING

import click

from comigs.data.batches import Batch, single_examples
from comigs.data.examples import IGNORED
from comigs.data.prepare import Texts
from comigs.text import harmless

if TYPE_CHECKING:
    from comigs.data.corpus import ChatEncoder
    from comigs.personal.tasks.questions import Question
    from comigs.personal.tasks.writing import Written

BRACKETS = ("\u27e6", "\u27e7")  # white square ones, where there are no colours


def examples(data: Texts, length: int, number: int, in_colours: bool) -> Iterator[str]:
    """Yield the first `number` windows of each client's train text as text; of chats, chats."""
    for name in data.names:
        train = data.load(name).train
        for place, batch in enumerate(islice(single_examples(train, length), number), 1):
            tokens, learnt = batch.inputs.size + 1, int((batch.targets != IGNORED).sum())
            yield f"{name}: train, example {place}: {tokens} tokens, {learnt} learnt"
            yield f"{marked(data.encoder.chats, batch, in_colours)}\n"


def answers(
    questions: Sequence[Question], base: Sequence[Written], own: Sequence[Written]
) -> Iterator[str]:
    """Yield each question with the right answer, the base's and the personal model's own."""
    for number, (asked, *written) in enumerate(zip(questions, base, own, strict=False), 1):
        yield f"question {number}: {harmless(asked.before[-1][1])}"
        yield f"  right: {harmless(asked.answer)}"
        for whose, answer in zip(("base", "own"), written, strict=True):
            yield f"  {whose}: {harmless(answer.text)}" + " [cut off]" * answer.is_cut


def marked(encoder: ChatEncoder, batch: Batch, in_colours: bool) -> str:
    """Return a window of one as text; what is learnt is coloured, or in white square brackets."""
    text = ""
    for is_learnt, ids in _parts(batch):
        # Words of strangers are shown, and not obeyed by the terminal.
        words = harmless(encoder.decode(ids))
        if is_learnt and in_colours:
            words = click.style(words, fg="black", bg="green")
        elif is_learnt:
            words = f"{BRACKETS[0]}{words}{BRACKETS[1]}"
        text += words
    return text


def _parts(batch: Batch) -> Iterator[tuple[bool, list[int]]]:
    """Yield the tokens of a window of one in stretches that are learnt, or are not."""
    inputs, targets = batch.inputs[0].tolist(), batch.targets[0].tolist()
    tokens = [(False, inputs[0])]
    for place, target in enumerate(targets):
        # Where nothing is learnt the token itself is the next input, except behind the last one.
        following = inputs[place + 1] if place + 1 < len(inputs) else target
        if following != IGNORED:
            tokens.append((target != IGNORED, following))
    for is_learnt, stretch in groupby(tokens, key=lambda token: token[0]):
        yield is_learnt, [id for _, id in stretch]
