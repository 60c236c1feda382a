"""What a model answers on windows of valid: the one way in which exports are compared with ours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from comigs.client.evaluate import Measurement
from comigs.data.batches import single_examples
from comigs.data.corpus import TokenStore
from comigs.data.examples import IGNORED
from comigs.perplexity import perplexity_of

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Outputs:
    """This record holds a model's logits_LV of the first window, and its mean nats per token."""

    logits_LV: Tensor
    nats_per_token: float

    @property
    def perplexity(self) -> float:
        """Return exp of the nats per token."""
        return perplexity_of(self.nats_per_token)

    def furthest(self, other: Outputs) -> float:
        """Return the largest difference between two logits of the first window."""
        return float((self.logits_LV - other.logits_LV).abs().max())

    def cost(self, other: Outputs) -> float:
        """Return how far this perplexity is above the other's, as a fraction of the other's."""
        return math.exp(self.nats_per_token - other.nats_per_token) - 1


def outputs(model: Any, windows: Sequence[tuple[Ids, Ids]]) -> Outputs:
    """Ask a model, in its own dtype, about windows of (1, length) each: inputs and targets."""
    nats, tokens, first = 0.0, 0, None
    for inputs, targets in windows:
        logits_LV, of_window = asked(model, inputs, targets)
        nats, tokens = nats + of_window, tokens + num_learnt(targets)
        first = logits_LV if first is None else first
    assert first is not None
    return Outputs(first, nats / tokens)


def asked(model: Any, inputs: Ids, targets: Ids) -> tuple[Tensor, float]:
    """Return the logits (L, V) of a window and the nats of its targets that are learnt."""
    with torch.no_grad():
        logits_LV = model(torch.from_numpy(inputs), use_cache=False).logits[0].float()
        targets_L = torch.from_numpy(targets[0])
        nats = F.cross_entropy(logits_LV, targets_L, reduction="sum", ignore_index=IGNORED)
    return logits_LV, float(nats)


def num_learnt(targets: Ids) -> int:
    """Return how many targets are learnt."""
    return int((targets != IGNORED).sum())


def measure_text(model: Any, stores: Sequence[TokenStore], length: int) -> Measurement:
    """Measure a model on every token of these stores that is learnt, once.

    length: tokens of a window.
    """
    nats, tokens = 0.0, 0
    for batch in single_examples(stores, length):
        _, of_window = asked(model, batch.inputs, batch.targets)
        nats, tokens = nats + of_window, tokens + num_learnt(batch.targets)
    return Measurement(nats, tokens, sum(store.measured_bytes(length) for store in stores), None)
