"""Rotation of queries and keys by their positions (RoPE, 2104.09864), in C (csrc/block.c)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from comigs import csrc


def takes(x: Tensor, cos: Tensor) -> bool:
    """Return whether C is there, and written for this dtype and this number of angles."""
    return csrc.takes(x) and x.dtype == cos.dtype and cos.shape[-1] % (2 * csrc.LANES) == 0


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return heads x (B, L, H, d) turned by the angles of their tokens.

    cos, sin: (B or 1, L, d), as `transformers` hands them to every block: of d / 2 angles, twice.
    """
    if not torch.is_grad_enabled():
        return _rotate(x, cos.contiguous(), sin.contiguous(), 1.0)
    turned: Tensor = _Rotation.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return turned


class _Rotation(torch.autograd.Function):
    """The two halves of a head's numbers are the two coordinates of d / 2 points."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, -1.0), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, way: float) -> Tensor:
    B, L, H, d = x.shape
    token = x.stride(1)
    if x.stride() != (L * token, token, d, 1):
        x, token = x.contiguous(), H * d
    y = x.new_empty(B, L, H, d)
    window = L * d if len(cos) > 1 else 0
    sizes = (B, L, H, d, x.dtype == torch.bfloat16, torch.get_num_threads(), window, token)
    csrc.call("rotate", *sizes, way, x, cos, sin, y)
    return y
