"""This module holds the LoRA on one attention linear: not routed, one per linear."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LoraLinear(nn.Module):
    """A linear with a LoRA computes `y = linear(x) + scale * x @ A^T @ B^T`.

    It holds no tensor of its own: `A` (R, in) and `B` (out, R) are pointed at a client's. x is
    (..., in), y (..., out). `merged` is a frozen change (out, in) of the linear, or None.
    """

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        self.A: Tensor | None = None
        self.B: Tensor | None = None
        self.scale = 1.0
        self.merged: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        if self.merged is not None:
            y = y + F.linear(x, self.merged.to(x.dtype))
        if self.A is None or self.B is None:
            return y
        low = F.linear(x, self.A.to(x.dtype))
        B = (self.scale * self.B).to(y.dtype)
        return torch.addmm(y.flatten(0, -2), low.flatten(0, -2).to(y.dtype), B.T).view_as(y)
