"""Frozen linears and low-rank A's that read one x, as one step of autograd.

By itself autograd would make the gradient to x of each, and add them up one after the other.

T tokens, S linears, I and O their widths, R the ranks that read x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from comigs.bases.packed import PackedLinear


class Frozen(NamedTuple):
    """A frozen linear, and a frozen change (O, I) of it, or None."""

    linear: nn.Module
    merged: Tensor | None = None

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """Return the linear's own (O, I). That of a packed one is there until the next is asked."""
        if isinstance(self.linear, PackedLinear):
            return self.linear.unpacked(dtype)
        weight: Tensor = self.linear.weight  # type: ignore[assignment]
        # transformers' Conv1D has its weight as (I, O).
        return (weight if isinstance(self.linear, nn.Linear) else weight.T).to(dtype)


def read(x_TI: Tensor, linears: Sequence[Frozen], A_RI: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return what each linear makes of x, (T, O) each, and x @ A^T (T, R)."""
    device = x_TI.device.type
    if torch.is_autocast_enabled(device):
        x_TI = x_TI.to(torch.get_autocast_dtype(device))
    if torch.is_grad_enabled():
        *frozen, low_TR = _Reading.apply(x_TI, A_RI, *linears)  # type: ignore[no-untyped-call]
    else:
        *frozen, low_TR = _results(x_TI, A_RI.to(x_TI.dtype), linears)
    return frozen, low_TR


class _Reading(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, A_RI: Tensor, *linears: Frozen) -> tuple[Tensor, ...]:
        ctx.linears, ctx.dtype = linears, A_RI.dtype
        A_RI = A_RI.to(x_TI.dtype)
        ctx.save_for_backward(x_TI, A_RI)
        return tuple(_results(x_TI, A_RI, linears))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x_TI, A_RI), (*grads_TO, grad_TR) = ctx.saved_tensors, grads
        wants_x, wants_A, *_ = ctx.needs_input_grad
        grad_x = grad_A = None
        if wants_A:
            grad_A = (grad_TR.T @ x_TI).to(ctx.dtype)
        if wants_x:
            grad_x = grad_TR @ A_RI
            for frozen, grad_TO in zip(ctx.linears, grads_TO, strict=True):
                grad_x.addmm_(grad_TO, frozen.matrix(grad_TO.dtype))
                if frozen.merged is not None:
                    grad_x.addmm_(grad_TO, frozen.merged.to(grad_TO.dtype))
        return grad_x, grad_A, *(None for _ in ctx.linears)


def _results(x_TI: Tensor, A_RI: Tensor, linears: Sequence[Frozen]) -> list[Tensor]:
    results = []
    for frozen in linears:
        y_TO: Tensor = frozen.linear(x_TI)
        if frozen.merged is not None:
            y_TO = torch.addmm(y_TO, x_TI, frozen.merged.T.to(y_TO.dtype))
        results.append(y_TO)
    return [*results, x_TI @ A_RI.T]
