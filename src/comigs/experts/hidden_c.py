"""This module computes the hidden layer of all experts in C (csrc/hidden.c).

It does so on CPUs, in float32, for the activations of the usual models.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_int64, c_void_p

import torch
from torch import Tensor

from comigs import csrc
from comigs.experts.hidden_layer import Gradients, HiddenLayer, Wanted

LARGEST_RANK = 256  # as in hidden.c


class _Expert(ctypes.Structure):
    """hidden.c's `expert`."""

    _fields_ = (("from", c_int64), ("rank", c_int64), ("learns", c_int64))


class Call(ctypes.Structure):
    """hidden.c's `layer`."""

    _fields_ = (
        *((name, c_int64) for name in ("T", "I", "R", "E", "S", "half", "act", "all", "threads")),
        ("frozen", c_void_p * 2),
        ("grad_frozen", c_void_p * 2),
        *((name, c_void_p) for name in ("weights", "low", "B", "A", "mixed", "out_low")),
        *((name, c_void_p) for name in ("grad_weights", "grad_low", "grad_B", "grad_A")),
        ("experts", POINTER(_Expert)),
    )


def takes(layer: HiddenLayer) -> bool:
    """Return whether hidden.c is compiled, and written for such a layer."""
    frozen = layer.frozen[0]
    return (
        csrc.takes(frozen)
        and layer.weights_TE.dtype == torch.float32
        and layer.settings.act.in_c is not None
        and frozen.shape[1] % csrc.LANES == 0
        and max(layer.settings.ranks) <= LARGEST_RANK
    )


def forward(layer: HiddenLayer) -> tuple[Tensor, Tensor]:
    """Return what `hidden_torch.forward` returns."""
    layer = _contiguous(layer)
    mixed_TI = torch.empty_like(layer.frozen[0])
    low_TR = layer.weights_TE.new_zeros(len(mixed_TI), len(layer.A_RI))
    csrc.call("forward", ctypes.byref(call_of(layer, mixed_TI, low_TR)))
    return mixed_TI, low_TR


def backward(
    layer: HiddenLayer, grad_mixed_TI: Tensor, grad_low_TR: Tensor, wanted: Wanted
) -> Gradients:
    """Return what `hidden_torch.backward` returns."""
    layer = _contiguous(layer)
    grad_mixed_TI, grad_low_TR = grad_mixed_TI.contiguous(), grad_low_TR.contiguous()
    call = call_of(layer, grad_mixed_TI, grad_low_TR)

    # Each token's gradients are written by the thread that works on it.
    weights_TE = _zeros(layer.weights_TE, wanted.weights_TE)
    low_TSR = _zeros(layer.low_TSR, wanted.low_TSR)
    frozen = [torch.empty_like(f_TI) for f_TI in layer.frozen]
    # What is a sum over tokens is summed by each thread (N of them) over its own, so that no
    # thread waits, and afterwards over threads in their order, so that it is the same every time.
    threads = call.threads
    B_NSRI = _zeros(layer.B_SRI.expand(threads, *layer.B_SRI.shape), wanted.B_SRI)
    A_NRI = _zeros(layer.A_RI.expand(threads, *layer.A_RI.shape), wanted.A_RI)

    call.grad_weights, call.grad_low = csrc.address(weights_TE), csrc.address(low_TSR)
    call.grad_B, call.grad_A = csrc.address(B_NSRI), csrc.address(A_NRI)
    for s, grad_TI in enumerate(frozen):
        call.grad_frozen[s] = csrc.address(grad_TI)
    csrc.call("backward", ctypes.byref(call))
    return Gradients(weights_TE, low_TSR, _total(B_NSRI), _total(A_NRI), frozen)


def _zeros(like: Tensor, wanted: bool) -> Tensor | None:
    return like.new_zeros(like.shape) if wanted else None


def _total(parts: Tensor | None) -> Tensor | None:
    return None if parts is None else parts.sum(dim=0)


def _contiguous(layer: HiddenLayer) -> HiddenLayer:
    return HiddenLayer(
        layer.settings,
        layer.weights_TE.contiguous(),
        layer.low_TSR.contiguous(),
        layer.B_SRI.contiguous(),
        layer.A_RI.contiguous(),
        [f_TI.contiguous() for f_TI in layer.frozen],
    )


def call_of(layer: HiddenLayer, mixed_TI: Tensor, low_TR: Tensor) -> Call:
    """Return what hidden.c is given. It points to the tensors, which must outlive it."""
    settings = layer.settings
    experts = (_Expert * len(settings.ranks))()
    for e, (ranks, learns) in enumerate(zip(layer.ranks(), settings.learns, strict=True)):
        experts[e] = _Expert(ranks.start, settings.ranks[e], learns)
    # The fields' meaning is in hidden.c; numbers come first there, then addresses.
    T, S, R = layer.low_TSR.shape
    call = Call(
        T=T,
        I=mixed_TI.shape[1],
        R=R,
        E=len(experts),
        S=S,
        half=mixed_TI.dtype == torch.bfloat16,
        act=settings.act.in_c,
        all=layer.used == 1,
        threads=torch.get_num_threads(),
        weights=csrc.address(layer.weights_TE),
        low=csrc.address(layer.low_TSR),
        B=csrc.address(layer.B_SRI),
        A=csrc.address(layer.A_RI),
        mixed=csrc.address(mixed_TI),
        out_low=csrc.address(low_TR),
        experts=experts,
    )
    for s, f_TI in enumerate(layer.frozen):
        call.frozen[s] = csrc.address(f_TI)
    return call
