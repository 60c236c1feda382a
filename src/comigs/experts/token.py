"""One token at a time, as text is written, in C (csrc/token.c): linears with a LoRA, the mixture.

A product with one token takes as long as its matrix takes to come from memory, and everything else
that is done for the token comes on top of that. So there is little else here: what C is given is
laid out once (`Attachment.lay_out`), and a linear or a mixture is one call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from ctypes import c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor, nn

from comigs import csrc
from comigs.bases.base import linear_size
from comigs.bases.packed import PackedLinear
from comigs.experts import hidden_c
from comigs.experts.activation import Activation
from comigs.experts.hidden_layer import HiddenLayer, HiddenSettings
from comigs.experts.packed import PackedExperts, PackedLora

NO_LORA = PackedLora(A=None, B=None, merged=None)


class _Linear(ctypes.Structure):
    """token.c's `linear`."""

    _fields_ = (
        *((name, c_int64) for name in ("I", "O", "R", "half", "type", "turned")),
        *((name, c_void_p) for name in ("weight", "change", "bias", "A", "B")),
    )


class _Mixture(ctypes.Structure):
    """token.c's `mixture`."""

    _fields_ = (
        ("hidden", hidden_c.Call),
        ("in", _Linear * 2),
        ("down", _Linear),
        ("A", c_void_p),
    )


class TokenLinear:
    """A frozen linear and a LoRA on it, laid out for C. Both must stay as they are."""

    def __init__(self, linear: nn.Module, dtype: torch.dtype, lora: PackedLora) -> None:
        weight: Any
        bias: Any = linear.bias
        if isinstance(linear, PackedLinear):
            weight, type = linear.blocks, int(linear.form)
        else:
            weight, type = linear.weight, 0
        (width_in, self.width), self.dtype = linear_size(linear), dtype
        # C has addresses only, so the tensors are kept here.
        self.tensors = (weight, bias, lora)
        self.call = _Linear(
            I=width_in,
            O=self.width,
            R=0 if lora.A is None else len(lora.A),
            half=dtype == torch.bfloat16,
            type=type,
            turned=not isinstance(linear, nn.Linear),
            weight=csrc.address(weight),
            change=csrc.address(lora.merged),
            bias=csrc.address(bias),
            A=csrc.address(lora.A),
            B=csrc.address(lora.B),
        )

    def takes(self, x: Tensor) -> bool:
        """Return whether x is one token, of which no gradient is wanted."""
        return _is_one_token(x, self.dtype)


class TokenMixture:
    """A mixture laid out for C: the frozen MLP and the experts, which must stay as they are."""

    def __init__(
        self, linears: Mapping[str, TokenLinear], hidden: HiddenLayer, experts: PackedExperts
    ) -> None:
        inputs = [linear.call for site, linear in linears.items() if site != "down"]
        self.dtype = linears["down"].dtype
        # The hidden layer is of numbers that C has for itself; here are its sizes and experts.
        layer = hidden_c.call_of(hidden, hidden.frozen[0], torch.empty(1, len(hidden.A_RI)))
        layer.threads = 1
        self.tensors = (linears, hidden, experts, layer)
        self.call = _Mixture(layer, (_Linear * 2)(*inputs), linears["down"].call)
        self.call.A = csrc.address(experts.A_in_RD)

    def takes(self, x: Tensor) -> bool:
        """Return whether x is one token, of which no gradient is wanted."""
        return _is_one_token(x, self.dtype)

    def __call__(self, x: Tensor, weights_TE: Tensor) -> Tensor:
        """Map one token x (..., D), with its routing weights (1, E), to (..., D)."""
        x, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        weights_TE = weights_TE.to(torch.float32).contiguous()
        sizes = (torch.get_num_threads(), ctypes.byref(self.call))
        csrc.call("token_mixture", *sizes, weights_TE, x, y)
        return y


def linear_in_c(
    linear: nn.Module, dtype: torch.dtype, lora: PackedLora = NO_LORA
) -> TokenLinear | None:
    """Return a linear laid out for C; None where C is not there, or not written for such a one.

    dtype: of the base.
    """
    if not isinstance(linear, nn.Linear) and type(linear).__name__ != "Conv1D":
        return None
    if any(width % csrc.LANES for width in linear_size(linear)):
        return None
    # What is packed has no weight until it is unpacked.
    if isinstance(linear, PackedLinear):
        is_readable = csrc.takes(torch.empty(0, dtype=dtype, device=linear.blocks.device))
    else:
        weight: Any = linear.weight
        is_readable = csrc.takes(weight) and weight.is_contiguous() and not weight.requires_grad
    return TokenLinear(linear, dtype, lora) if is_readable else None


def mixture_in_c(
    linears: Mapping[str, nn.Module],
    act: Activation,
    experts: PackedExperts,
    dtype: torch.dtype,
) -> TokenMixture | None:
    """Return a mixture laid out for C, or None as `linear_in_c`.

    linears: the MLP's by their site, in the order of the experts' inputs, then "down".
    """
    laid_out = {}
    for site, linear in linears.items():
        # The inputs' LoRA is added in the hidden layer, where each expert has its own.
        lora = PackedLora(None, None, experts.merged.get(site))
        if site == "down":
            lora = PackedLora(experts.A_RI, experts.B_RD, lora.merged)
        if (ready := linear_in_c(linear, dtype, lora)) is None:
            return None
        laid_out[site] = ready
    # Weights that sum to less than 1 leave as much less of the bias: not written in C.
    if experts.W_ED is not None and experts.top_k == 1 and linears["down"].bias is not None:
        return None

    E, (S, R, I) = len(experts.ranks), experts.B_SRI.shape  # noqa: E741
    used = E if experts.W_ED is None else experts.top_k
    hidden = HiddenLayer(
        settings=HiddenSettings(act, experts.ranks, [False] * E, used),
        weights_TE=torch.empty(1, E),
        low_TSR=torch.empty(1, S, R),
        B_SRI=experts.B_SRI,
        A_RI=experts.A_RI,
        frozen=[torch.empty(1, I) for _ in range(S)],
    )
    return TokenMixture(laid_out, hidden, experts) if hidden_c.takes(hidden) else None


def apply(linears: Sequence[TokenLinear], x: Tensor) -> list[Tensor]:
    """Return what linears make of one token x (..., I), in one call: (..., O) each."""
    widths = [linear.width for linear in linears]
    x, y = x.contiguous(), x.new_empty(*x.shape[:-1], sum(widths))
    calls = (c_void_p * len(linears))(*(ctypes.addressof(linear.call) for linear in linears))
    csrc.call("token_linears", len(linears), torch.get_num_threads(), calls, x, y)
    return list(y.split(widths, dim=-1))


def quicker(linear: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
    """Return what computes as a frozen linear does, one token at a time in C; None where C cannot.

    dtype: of the base.
    """
    in_c, own = linear_in_c(linear, dtype), linear.forward
    if in_c is None:
        return None
    return lambda x: apply([in_c], x)[0] if in_c.takes(x) else own(x)


def _is_one_token(x: Tensor, dtype: torch.dtype) -> bool:
    return (
        x.numel() == x.shape[-1]
        and x.dtype == dtype
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )
