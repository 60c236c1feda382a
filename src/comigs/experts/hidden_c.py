"""The hidden layer of all experts in C (compiled/hidden.c): on CPUs, in float32, for the usual
models' activations.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_int64, c_void_p

import torch
from torch import Tensor

from comigs.experts import csrc
from comigs.experts.layer import Gradients, Layer

LANES = 16  # hidden.c's: I is a multiple
LARGEST_RANK = 256  # hidden.c's


class _Expert(ctypes.Structure):
    """hidden.c's `expert`."""

    _fields_ = (("from", c_int64), ("rank", c_int64), ("learns", c_int64))


class _Layer(ctypes.Structure):
    """hidden.c's `layer`."""

    _fields_ = (
        *((name, c_int64) for name in ("T", "I", "R", "E", "S", "half", "act", "all", "threads")),
        ("frozen", c_void_p * 2), ("grad_frozen", c_void_p * 2),
        *((name, c_void_p) for name in ("weights", "low", "B", "A", "mixed", "out_low")),
        *((name, c_void_p) for name in ("grad_weights", "grad_low", "grad_B", "grad_A")),
        ("experts", POINTER(_Expert)),
    )  # fmt: skip


def takes(layer: Layer) -> bool:
    """Whether it is compiled, and for such a layer."""
    frozen = layer.frozen[0]
    return (
        csrc.takes(frozen)
        and layer.weights_TE.dtype == torch.float32
        and layer.act.in_c is not None
        and frozen.shape[1] % LANES == 0
        and max(layer.ranks) <= LARGEST_RANK
    )


def forward(layer: Layer) -> tuple[Tensor, Tensor]:
    """As `chunks.forward`."""
    layer = _contiguous(layer)
    mixed_TI = torch.empty_like(layer.frozen[0])
    low_TR = layer.weights_TE.new_zeros(len(mixed_TI), len(layer.A_RI))
    csrc.call("forward", ctypes.byref(_call(layer, mixed_TI, low_TR)))
    return mixed_TI, low_TR


def backward(
    layer: Layer, grad_mixed_TI: Tensor, grad_low_TR: Tensor, wanted: Sequence[bool]
) -> Gradients:
    """As `chunks.backward`. Each thread sums up its own tokens; the sums are added in the threads'
    order.
    """
    layer, grad_mixed_TI, grad_low_TR = (
        _contiguous(layer),
        grad_mixed_TI.contiguous(),
        grad_low_TR.contiguous(),
    )
    threads = torch.get_num_threads()
    frozen = [torch.empty_like(f_TI) for f_TI in layer.frozen]
    per_token, summed = (layer.weights_TE, layer.low_TSR), (layer.B_SRI, layer.A_RI)
    shapes = [*(t.shape for t in per_token), *((threads, *t.shape) for t in summed)]
    weights, low, B, A = (
        layer.A_RI.new_zeros(shape) if is_wanted else None
        for shape, is_wanted in zip(shapes, wanted, strict=True)
    )
    call = _call(layer, grad_mixed_TI, grad_low_TR)
    call.grad_weights, call.grad_low, call.grad_B, call.grad_A = map(_at, (weights, low, B, A))
    for s, grad in enumerate(frozen):
        call.grad_frozen[s] = _at(grad)
    csrc.call("backward", ctypes.byref(call))
    return Gradients(
        weights,
        low,
        None if B is None else B.sum(dim=0),
        None if A is None else A.sum(dim=0),
        frozen,
    )


def _contiguous(layer: Layer) -> Layer:
    tensors = (layer.weights_TE, layer.low_TSR, layer.B_SRI, layer.A_RI)
    weights_TE, low_TSR, B_SRI, A_RI = (t.contiguous() for t in tensors)
    frozen = [f_TI.contiguous() for f_TI in layer.frozen]
    return layer._replace(
        weights_TE=weights_TE, low_TSR=low_TSR, B_SRI=B_SRI, A_RI=A_RI, frozen=frozen
    )


def _call(layer: Layer, mixed_TI: Tensor, low_TR: Tensor) -> _Layer:
    """Points to the tensors, which must outlive it."""
    numbers = zip(layer.rows(), layer.ranks, layer.learns, strict=True)
    experts = (_Expert * len(layer.ranks))(
        *(_Expert(rows.start, rank, learns) for rows, rank, learns in numbers)
    )
    T, S, R = layer.low_TSR.shape
    call = _Layer(
        T=T, I=mixed_TI.shape[1], R=R, E=len(experts), S=S, half=mixed_TI.dtype == torch.bfloat16,
        act=layer.act.in_c, all=layer.used == 1, threads=torch.get_num_threads(), weights=_at(layer.weights_TE),
        low=_at(layer.low_TSR), B=_at(layer.B_SRI), A=_at(layer.A_RI), mixed=_at(mixed_TI), out_low=_at(low_TR),
        experts=experts,
    )  # fmt: skip
    for s, f_TI in enumerate(layer.frozen):
        call.frozen[s] = _at(f_TI)
    return call


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
