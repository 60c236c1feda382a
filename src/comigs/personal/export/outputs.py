"""What a model answers on windows of valid: the one way in which exports are compared with ours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from comigs.client.evaluate import Measurement
from comigs.data.batches import Batch, evaluation_windows
from comigs.data.corpus import TokenStore


@dataclass(frozen=True)
class Outputs:
    """This record holds a model's logits_LV of the first window, and its mean nats per token."""

    logits_LV: Tensor
    nats_per_token: float

    @property
    def perplexity(self) -> float:
        """Return exp of the nats per token."""
        return math.exp(min(self.nats_per_token, 700))

    def furthest(self, other: Outputs) -> float:
        """Return the largest difference between two logits of the first window."""
        return float((self.logits_LV - other.logits_LV).abs().max())

    def cost(self, other: Outputs) -> float:
        """Return how far this perplexity is above the other's, as a fraction of the other's."""
        return math.exp(self.nats_per_token - other.nats_per_token) - 1


def outputs(model: Any, windows: Sequence[Batch]) -> Outputs:
    """Ask a model, in its own dtype, about windows of (1, length) each."""
    nats, tokens, first = 0.0, 0, None
    with torch.no_grad():
        for inputs, targets in windows:
            logits_LV = model(torch.from_numpy(inputs), use_cache=False).logits[0].float()
            nats += float(F.cross_entropy(logits_LV, torch.from_numpy(targets[0]), reduction="sum"))
            tokens += targets.size
            first = logits_LV if first is None else first
    assert first is not None
    return Outputs(first, nats / tokens)


def measure_text(model: Any, stores: Sequence[TokenStore], length: int) -> Measurement:
    """Measure a model on every token of these stores once, in windows of `length` tokens."""
    nats, tokens = 0.0, 0
    with torch.no_grad():
        for inputs, targets in evaluation_windows(stores, length, 1):
            logits_LV = model(torch.from_numpy(inputs), use_cache=False).logits[0].float()
            nats += float(F.cross_entropy(logits_LV, torch.from_numpy(targets[0]), reduction="sum"))
            tokens += targets.size
    return Measurement(nats, tokens, sum(store.num_bytes for store in stores), None)
