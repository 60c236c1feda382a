"""Norms by the root of the mean square (1910.07467), in C (csrc/block.c).

`transformers` computes one in five to ten passes over a block's numbers; this is one pass forward
and one backward, in float32, and keeps one number a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from comigs import csrc


def in_c(norm: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Return what computes the same as a frozen norm of a base, or None where that is not known.

    Families write it in one of two ways, with the weight as it is or beside 1. Which one, the norm
    itself says, asked once with random numbers.
    """
    weight: Any = getattr(norm, "weight", None)
    eps: Any = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not type(norm).__name__.endswith("RMSNorm") or weight is None or eps is None:
        return None
    if weight.requires_grad or weight.shape[-1] % csrc.LANES or not csrc.takes(weight):
        return None
    # A class's name promises no formula: what computes something else keeps it.
    forward = norm.forward
    sample = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0))
    sample = sample.to(weight.dtype)
    for plus in (0.0, 1.0):
        found, expected = _forward(sample, weight, eps, plus)[0], forward(sample)
        if torch.allclose(found.float(), expected.float(), rtol=0.02, atol=1e-3):

            def compute(x: Tensor, plus: float = plus) -> Tensor:
                if not csrc.takes(x) or x.dtype != weight.dtype:
                    return forward(x)  # type: ignore[no-any-return]
                if not torch.is_grad_enabled():
                    return _forward(x.contiguous(), weight, eps, plus)[0]
                y: Tensor = _RmsNorm.apply(x, weight, eps, plus)  # type: ignore[no-untyped-call]
                return y

            return compute
    return None


class _RmsNorm(torch.autograd.Function):
    """y = x / sqrt(mean x^2 + eps) * (weight + plus), of a frozen weight (D,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, plus: float) -> Tensor:
        x = x.contiguous()
        y, inverse = _forward(x, weight, eps, plus)
        ctx.save_for_backward(x, weight, inverse)
        ctx.plus = plus
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight, inverse = ctx.saved_tensors
        grad, grad_x = grad.contiguous(), torch.empty_like(x)
        sizes = (*_sizes(x), ctx.plus)
        csrc.call("rms_norm_backward", *sizes, x, weight, inverse, grad, grad_x)
        return grad_x, None, None, None


def _forward(x: Tensor, weight: Tensor, eps: float, plus: float) -> tuple[Tensor, Tensor]:
    """Return y, and 1 / sqrt(mean x^2 + eps) of every row."""
    y, inverse = torch.empty_like(x), torch.empty(x.shape[:-1])
    csrc.call("rms_norm_forward", *_sizes(x), float(eps), plus, x, weight, y, inverse)
    return y, inverse


def _sizes(x: Tensor) -> tuple[int, ...]:
    T, D = x.numel() // x.shape[-1], x.shape[-1]
    return T, D, x.dtype == torch.bfloat16, torch.get_num_threads()
