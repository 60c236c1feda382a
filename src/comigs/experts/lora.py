"""This module holds the LoRA on attention linears: not routed, one per linear."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comigs.experts import token
from comigs.experts.packed import PackedLora
from comigs.experts.reading import Frozen, read


class LoraLinear(nn.Module):
    """A linear with a LoRA computes `y = linear(x) + scale * x @ A^T @ B^T`.

    It holds no tensor of its own: `A` (R, in) and `B` (out, R) are pointed at a client's. x is
    (..., in), y (..., out). `merged` is a frozen change (out, in) of the linear, or None.
    `one_token` is all of it laid out for one token at a time, or None.
    """

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        self.A: Tensor | None = None
        self.B: Tensor | None = None
        self.scale = 1.0
        self.merged: Tensor | None = None
        self.one_token: token.TokenLinear | None = None

    def forward(self, x: Tensor) -> Tensor:
        return adapted(x, [self])[0]

    def packed(self, dtype: torch.dtype) -> PackedLora:
        """Return copies of its tensors in the base's dtype."""
        merged = None if self.merged is None else self.merged.to(dtype, copy=True)
        if self.A is None or self.B is None:
            return PackedLora(None, None, merged)
        B_RO = (self.scale * self.B.T).to(dtype).contiguous()
        return PackedLora(self.A.to(dtype, copy=True), B_RO, merged)


def adapted(x: Tensor, linears: Sequence[LoraLinear]) -> list[Tensor]:
    """Return what linears that read the same x make of it, with the LoRA of each."""
    ready = [lora.one_token for lora in linears if lora.one_token is not None]
    if len(ready) == len(linears) and ready[0].takes(x):
        return token.apply(ready, x)
    As = [lora.A for lora in linears if lora.A is not None]
    if len(As) < len(linears):
        return [_alone(x, lora) for lora in linears]
    frozen = [Frozen(lora.linear, lora.merged) for lora in linears]
    results, low = read(x.flatten(0, -2), frozen, torch.cat(As) if len(As) > 1 else As[0])
    found = []
    for lora, y, own in zip(linears, results, low.split([len(A) for A in As], 1), strict=True):
        B: Any = lora.B
        B = (lora.scale * B).to(y.dtype)
        found.append(torch.addmm(y, own, B.T).view(*x.shape[:-1], -1))
    return found


def _alone(x: Tensor, lora: LoraLinear) -> Tensor:
    """Return what a linear makes of x where no client is at work."""
    y: Tensor = lora.linear(x)
    return y if lora.merged is None else y + F.linear(x, lora.merged.to(x.dtype))
