"""The hidden layer of all experts as one autograd function that recomputes instead of storing.

Plain autograd would keep about five (T, I) tensors per expert and block for the backward pass. This keeps the frozen
products only, which all experts share, and rebuilds each expert's hidden layer from them when its turn comes: in C
where it can be (`in_c`), else in PyTorch (`chunks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from comigs.experts import chunks, in_c
from comigs.experts.activation import Activation
from comigs.experts.layer import ExpertLora, Layer, by_expert, flat_of


class MixedHidden(torch.autograd.Function):
    """(weights (T, E), frozen products, experts' tensors) -> (sum_e w_e h_e, all experts' A_e @ (w_e h_e)^T).

    Call through `mixed_hidden`.
    """

    @staticmethod
    def forward(
        ctx: Any, act: Activation, num_frozen: int, used: float, weights_TE: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.act, ctx.num_frozen, ctx.used = act, num_frozen, used
        ctx.save_for_backward(weights_TE, *tensors)
        layer = Layer(act, used, tensors[:num_frozen], weights_TE, by_expert(tensors[num_frozen:], num_frozen))
        mixed_TI, lows = (in_c if in_c.takes(layer) else chunks).forward(layer)
        return mixed_TI, torch.cat(lows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_mixed_TI, grad_lows = grads
        weights_TE, *tensors = ctx.saved_tensors
        S = ctx.num_frozen
        layer = Layer(ctx.act, ctx.used, tensors[:S], weights_TE, by_expert(tensors[S:], S))
        per_expert = grad_lows.split([len(lora.A_RI) for lora in layer.experts])
        wanted = ctx.needs_input_grad[3:]
        found = (in_c if in_c.takes(layer) else chunks).backward(
            layer, grad_mixed_TI, per_expert, wanted[0], wanted[1 + S :]
        )
        return (None, None, None, found.weights_TE, *found.frozen, *found.flat)


def mixed_hidden(
    act: Activation, frozen: Sequence[Tensor], weights_TE: Tensor, experts: Sequence[ExpertLora], top_k: int
) -> tuple[Tensor, Tensor]:
    """Mixed hidden layer (T, I), and the experts' weighted low-rank inputs to `down` below each other (sum of R, T).

    frozen: up's product (T, I), or gate's and up's; all else is of one dtype, in which the work is done. top_k: so
    many of a token's weights are not zero; the others have no gradient.
    """
    # elsewhere, to ask which tokens are an expert's would make the processor wait for the device
    used = min(1.0, top_k / len(experts)) if weights_TE.device.type == "cpu" else 1.0
    with torch.autocast(weights_TE.device.type, enabled=False):
        mixed: tuple[Tensor, Tensor] = MixedHidden.apply(act, len(frozen), used, weights_TE, *frozen, *flat_of(experts))  # type: ignore[no-untyped-call]
    return mixed
