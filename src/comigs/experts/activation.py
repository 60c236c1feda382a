"""This module holds activations as the mixture needs them: in place, value and slope together.

SiLU and GELU's tanh form are both x * s with s = sigmoid(q(x)), where q = x and
q = sqrt(8 / pi) (x + 0.044715 x^3), so their slope is s + x s (1 - s) q'(x). They are spelled out
for CPUs, where PyTorch computes the tanh of a GELU one number at a time: this takes a third of
that. On other devices PyTorch has a kernel for either, and for other activations what is there is
used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
    if name in SPELLED_OUT:
        return SPELLED_OUT[name] if device.type == "cpu" else IN_ONE_KERNEL[name]
    return by_autograd(module)


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


def in_one_kernel(kernel: Any, backward: Any, **settings: str) -> Activation:
    """Return an activation as two of PyTorch's operators: f in place, and f' times a gradient."""

    def value(x: Tensor, spare: Tensor) -> None:
        kernel(x, **settings)

    def value_and_slope(x: Tensor, slope: Tensor, spare: Tensor) -> None:
        backward.grad_input(slope.fill_(1), x, **settings, grad_input=slope)
        kernel(x, **settings)

    return Activation(value, value_and_slope)


aten = torch.ops.aten
_silu_kernel = in_one_kernel(aten.silu_, aten.silu_backward)
_gelu_kernel = in_one_kernel(aten.gelu_, aten.gelu_backward, approximate="tanh")
IN_ONE_KERNEL = {
    **{"NewGELUActivation": _gelu_kernel, "GELUTanh": _gelu_kernel},
    "SiLUActivation": _silu_kernel,
}
