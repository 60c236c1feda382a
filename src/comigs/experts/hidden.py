"""The hidden layer of all experts as one autograd function that recomputes instead of storing.

Plain autograd would keep about five (T, I) tensors per expert and block for the backward pass. This
keeps the frozen products only, which all experts share, and rebuilds each expert's hidden layer
from them when its turn comes: in C where it can be (`in_c`), else in PyTorch (`chunks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from comigs.experts import hidden_c, hidden_torch
from comigs.experts.activation import Activation
from comigs.experts.layer import Layer


class MixedHidden(torch.autograd.Function):
    """A layer -> (sum_e w_e h_e (T, I), all experts' (w_e h_e) @ A_e^T (T, R)). Call through
    `mixed_hidden`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        act: Activation,
        ranks: Sequence[int],
        learns: Sequence[bool],
        used: float,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.settings = (act, ranks, learns, used)
        ctx.save_for_backward(*tensors)
        layer = Layer._make((*ctx.settings, *tensors[:4], tensors[4:]))
        mixed: tuple[Tensor, Tensor] = _way(layer).forward(layer)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layer = Layer._make((*ctx.settings, *ctx.saved_tensors[:4], ctx.saved_tensors[4:]))
        *found, frozen = _way(layer).backward(layer, *grads, ctx.needs_input_grad[4:8])
        return (None, None, None, None, *found, *frozen)


def _way(layer: Layer) -> ModuleType:
    return hidden_c if hidden_c.takes(layer) else hidden_torch


def mixed_hidden(
    act: Activation, ranks: Sequence[int], learns: Sequence[bool], top_k: int, weights_TE: Tensor, low_TSR: Tensor,
    B_SRI: Tensor, A_RI: Tensor, frozen: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mixed hidden layer (T, I), and the experts' weighted low-rank inputs to `down` beside each
    other (T, R).

    As layer.py says. top_k: so many of a token's weights are not zero; the others have no gradient.
    """
    # elsewhere, to ask which tokens are an expert's would make the processor wait for the device
    used = min(1.0, top_k / len(ranks)) if weights_TE.device.type == "cpu" else 1.0
    with torch.autocast(weights_TE.device.type, enabled=False):
        mixed: tuple[Tensor, Tensor] = MixedHidden.apply(  # type: ignore[no-untyped-call]
            act, ranks, learns, used, weights_TE, low_TSR, B_SRI, A_RI, *frozen
        )
    return mixed
