"""This page says how well a model predicts text: every token counts once, and nothing is drawn.

A model and every random generator are left as they were found. L blocks, E experts.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from comigs.client.loss import autocast, sum_cross_entropy, windows_on
from comigs.data.batches import Batch, evaluation_windows
from comigs.data.corpus import TokenStore
from comigs.experts.attach import Attachment
from comigs.perplexity import perplexity_of


@dataclass(frozen=True)
class Measurement:
    """A measurement has sums over a text, and the three figures that follow from them.

    nats: the sum of -ln p over `tokens` tokens, which are `bytes` bytes of text; of chats, over
    those that are learnt.
    expert_share_LE: the mean routing weight of each expert in each block; None without a router.
    """

    nats: float
    tokens: int
    bytes: int
    expert_share_LE: list[list[float]] | None

    @property
    def nats_per_token(self) -> float:
        """The mean of -ln p over tokens."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp of the nats per token; above 700 nats, exp(700)."""
        return perplexity_of(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float:
        """The bits that the text takes under the model, for each byte of the original text."""
        return self.nats / math.log(2) / self.bytes

    def figures(self) -> dict[str, float | int]:
        """Return what is reported, by the names that are used everywhere."""
        names = ("nats_per_token", "perplexity", "bits_per_byte", "tokens", "bytes")
        return {name: getattr(self, name) for name in names}


def evaluate(
    attachment: Attachment,
    stores: Sequence[TokenStore],
    length: int,
    batch_size: int,
    dtype: torch.dtype,
) -> Measurement:
    """Measure whatever the attachment is bound to on every token of `stores` once.

    Of chats, these are the tokens that are learnt.

    Bound to nothing, that is the base alone. length: tokens per window. batch_size: windows at
    once. dtype: of matrix products.
    """
    windows = evaluation_windows(stores, length, batch_size)
    num_bytes = sum(store.measured_bytes(length) for store in stores)
    return measure(attachment, windows, dtype, num_bytes)


def measure(
    attachment: Attachment, windows: Iterable[Batch], dtype: torch.dtype, num_bytes: int = 0
) -> Measurement:
    """Measure whatever the attachment is bound to on these windows.

    num_bytes: the bytes of text that the windows stand for.
    """
    model = attachment.model
    nats, tokens = 0.0, 0
    share_sum_LE: Tensor | None = None
    with torch.no_grad(), evaluation_mode(model):
        for batch in windows:
            # Sums, not means: the last windows are shorter, and each token counts once.
            on_device = windows_on(model.device, batch)
            with autocast(dtype, model.device):
                nats += float(sum_cross_entropy(model, on_device))
            tokens += batch.num_learnt
            routings = attachment.routings(on_device.learnt)
            weights = [routing.weights_TE.sum(dim=0) for routing in routings]
            if weights:
                batch_LE = torch.stack(weights).double()
                share_sum_LE = batch_LE if share_sum_LE is None else share_sum_LE + batch_LE
    if share_sum_LE is None:
        return Measurement(nats, tokens, num_bytes, None)
    return Measurement(nats, tokens, num_bytes, (share_sum_LE / tokens).tolist())


@contextlib.contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Put a model into evaluation mode inside, and every module's mode back after."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
