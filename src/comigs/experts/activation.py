"""This module holds activations as the mixture needs them: in place, value and slope together.

SiLU and GELU's tanh form are both x * s with s = sigmoid(q(x)), where q = x and
q = sqrt(8 / pi) (x + 0.044715 x^3), so their slope is s + x s (1 - s) q'(x). They are spelled out
for CPUs, where PyTorch computes the tanh of a GELU one number at a time: this takes a third of
that. On other devices, and for other activations, what is there is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = math.sqrt(8 / math.pi)
CUBE = 0.044715


@dataclass(frozen=True)
class Activation:
    """An activation is an element-wise f.

    `value(x, spare)` turns x into f(x); `value_and_slope(x, slope, spare)` also writes f'(x) into
    `slope`. All are of one shape, and what `slope` and `spare` held is lost. `in_c` is the
    activation's number in hidden.c, or None.
    """

    value: Callable[[Tensor, Tensor], object]
    value_and_slope: Callable[[Tensor, Tensor, Tensor], object]
    in_c: int | None = None


def activation_of(module: Any, device: torch.device) -> Activation:
    """Return the activation that an MLP of `transformers` holds."""
    name = type(module).__name__
    if name in SPELLED_OUT and device.type == "cpu":
        return SPELLED_OUT[name]
    return by_autograd(FUSED.get(name, module))


def by_autograd(function: Callable[[Tensor], Tensor]) -> Activation:
    """Return any element-wise function as an activation."""

    def value_and_slope(x: Tensor, slope: Tensor, spare: Tensor) -> None:
        with torch.enable_grad():
            leaf = x.clone().requires_grad_()
            y = function(leaf)
        slope.copy_(torch.autograd.grad(y, leaf, torch.ones_like(y))[0])
        x.copy_(y.detach())

    return Activation(lambda x, spare: x.copy_(function(x)), value_and_slope)


def _root_plus(square: Tensor, factor: float, out: Tensor) -> Tensor:
    """Write ROOT * (1 + factor * x^2) into `out` in one pass, and return it."""
    return torch.add(torch.tensor(ROOT, dtype=square.dtype), square, alpha=factor * ROOT, out=out)


def _gelu(x: Tensor, spare: Tensor) -> None:
    square = torch.mul(x, x, out=spare)
    x.mul_(_root_plus(square, CUBE, spare).mul_(x).sigmoid_())


def _gelu_and_slope(x: Tensor, slope: Tensor, spare: Tensor) -> None:
    square = torch.mul(x, x, out=slope)
    s = _root_plus(square, CUBE, spare).mul_(x).sigmoid_()
    x.mul_(s)
    _root_plus(square, 3 * CUBE, slope).mul_(x)  # q'(x) f(x)
    slope.addcmul_(slope, s, value=-1).add_(s)


def _silu(x: Tensor, spare: Tensor) -> None:
    x.mul_(torch.sigmoid(x, out=spare))


def _silu_and_slope(x: Tensor, slope: Tensor, spare: Tensor) -> None:
    s = torch.sigmoid(x, out=spare)
    x.mul_(s)
    torch.addcmul(x, x, s, value=-1, out=slope).add_(s)


SILU, GELU = Activation(_silu, _silu_and_slope, in_c=0), Activation(_gelu, _gelu_and_slope, in_c=1)
SPELLED_OUT = {"NewGELUActivation": GELU, "GELUTanh": GELU, "SiLUActivation": SILU}
# Without this, transformers' NewGELUActivation would be six kernels.
_TANH_GELU = partial(F.gelu, approximate="tanh")
FUSED = {"NewGELUActivation": _TANH_GELU, "GELUTanh": _TANH_GELU}
