"""How well a model predicts text: every token once, nothing drawn at random, nothing left
changed.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from comigs.client.loss import sum_cross_entropy
from comigs.client.steps import autocast
from comigs.data.batches import Batch, evaluation_windows
from comigs.data.corpus import TokenStore
from comigs.experts.attach import Attachment


@dataclass(frozen=True)
class Measurement:
    """Sums over the text, and the three figures that follow from them.

    nats: sum of -ln p over `tokens` tokens, which are `bytes` bytes of text.
    expert_share_LE: mean routing weight of each expert per block, None without a router.
    """

    nats: float
    tokens: int
    bytes: int
    expert_share_LE: list[list[float]] | None

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp of the nats per token (of 700 at most, the last that a float holds)."""
        return math.exp(min(self.nats_per_token, 700))

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    def figures(self) -> dict[str, float | int]:
        """What is reported, by the names used everywhere."""
        names = ("nats_per_token", "perplexity", "bits_per_byte", "tokens", "bytes")
        return {name: getattr(self, name) for name in names}


def evaluate(
    attachment: Attachment,
    stores: Sequence[TokenStore],
    length: int,
    batch_size: int,
    dtype: torch.dtype,
) -> Measurement:
    """Evaluate whatever the attachment is bound to (nothing: the base) on every token of `stores`
    once.

    length: tokens per window. batch_size: windows at once. dtype: of autocast.
    """
    return measure(
        attachment,
        evaluation_windows(stores, length, batch_size),
        dtype,
        sum(store.num_bytes for store in stores),
    )


def measure(
    attachment: Attachment, windows: Iterable[Batch], dtype: torch.dtype, num_bytes: int = 0
) -> Measurement:
    """Evaluate whatever the attachment is bound to on these windows, which stand for `num_bytes`
    bytes of text.
    """
    model = attachment.model
    nats, tokens, shares = 0.0, 0, None
    with torch.no_grad(), evaluation_mode(model):
        for inputs, targets in windows:
            x, y = (torch.from_numpy(a).to(model.device) for a in (inputs, targets))
            with autocast(dtype, x.device):
                nats += float(sum_cross_entropy(model, x, y))
            tokens += targets.size
            if routings := attachment.routings():
                batch_LE = torch.stack([r.weights_TE.sum(dim=0) for r in routings]).double()
                shares = batch_LE if shares is None else shares + batch_LE
    return Measurement(
        nats, tokens, num_bytes, None if shares is None else (shares / tokens).tolist()
    )


@contextlib.contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """eval() inside, every module's mode as found after."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
