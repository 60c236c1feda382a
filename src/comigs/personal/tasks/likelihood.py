"""This module says how likely a model finds each of several answers to a question."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import NamedTuple

import numpy as np
import torch

from comigs.bases.chat_encoder import ChatEncoder
from comigs.client.loss import autocast, cross_entropy_by_window, windows_on
from comigs.data.batches import Batch, joined
from comigs.data.document import Turn
from comigs.data.examples import IGNORED
from comigs.experts.attach import Attachment


class Candidate(NamedTuple):
    """A candidate is a chat that ends in a possible answer, as inputs and targets.

    Targets are the answer's tokens, with the one that ends it, and IGNORED elsewhere. is_whole: the
    window holds all of the answer.
    """

    window: Batch
    is_whole: bool

    @property
    def tokens(self) -> int:
        """How many tokens of the answer are in the window."""
        return self.window.num_learnt


def candidate(
    encoder: ChatEncoder, before: Sequence[Turn], answer: str, length: int, where: str
) -> Candidate:
    """Return a chat that ends in this answer, cut after `length` predictions, as in training.

    Raises UserError, naming the place, where the base has no tokens for it.
    """
    # The length of a window is what limits it, not that of the model, which is more.
    whole = copy(encoder)
    whole.longest = 1 << 40
    ids, learnt, _ = whole.encode((*before, ("assistant", answer)), where)
    # The answer begins where the words that ask for it end; earlier answers are learnt, too.
    first = len(whole.prompt(before, where))
    last = len(learnt) - learnt[::-1].index(True)
    targets = np.full(len(ids), IGNORED)
    targets[first:last] = ids[first:last]
    inputs = np.array(ids[:-1][:length])
    positions = np.arange(len(inputs))
    window = Batch(inputs[None], targets[None, 1 : length + 1], positions[None])
    return Candidate(window, last <= length + 1)


def nats_of(
    attachment: Attachment,
    candidates: Sequence[Candidate],
    batch_size: int,
    dtype: torch.dtype,
) -> list[float]:
    """Return -ln of the probability that whatever is attached gives to each answer.

    batch_size: candidates at once. dtype: of matrix products.
    """
    # Those of like length go together, since all of a batch are as long as the longest.
    order = sorted(range(len(candidates)), key=lambda n: candidates[n].window.inputs.size)
    nats = [0.0] * len(candidates)
    model = attachment.model
    for first in range(0, len(order), batch_size):
        numbers = order[first : first + batch_size]
        batch = joined([candidates[number].window for number in numbers])
        with torch.no_grad(), autocast(dtype, model.device):
            found = cross_entropy_by_window(model, windows_on(model.device, batch))
        for number, value in zip(numbers, found.tolist(), strict=True):
            nats[number] = value
    return nats
