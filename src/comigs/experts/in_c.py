"""The hidden layer of all experts in C (compiled/hidden.c): on CPUs, in float32, for the usual models' activations."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_int64, c_void_p

import torch
from torch import Tensor

from comigs import compiled
from comigs.experts.layer import Gradients, Layer, by_expert, flat_of

LANES = 16  # hidden.c's: I is a multiple
LARGEST_RANK = 256  # hidden.c's


class _Expert(ctypes.Structure):
    """hidden.c's `expert`."""

    _fields_ = (
        ("rank", c_int64), ("low", c_void_p * 2), ("B", c_void_p * 2), ("A", c_void_p), ("out_low", c_void_p),
        ("grad_low", c_void_p * 2), ("grad_B", c_void_p * 2), ("grad_A", c_void_p),
    )  # fmt: skip


class _Layer(ctypes.Structure):
    """hidden.c's `layer`."""

    _fields_ = (
        *((name, c_int64) for name in ("T", "I", "E", "S", "half", "act", "all", "threads")),
        ("frozen", c_void_p * 2), ("weights", c_void_p), ("mixed", c_void_p), ("grad_frozen", c_void_p * 2),
        ("grad_weights", c_void_p), ("experts", POINTER(_Expert)),
    )  # fmt: skip


def takes(layer: Layer) -> bool:
    """Whether it is compiled, and for such a layer."""
    frozen = layer.frozen[0]
    return (
        compiled.takes(frozen)
        and layer.weights_TE.dtype == torch.float32
        and layer.act.in_c is not None
        and frozen.shape[1] % LANES == 0
        and max(len(lora.A_RI) for lora in layer.experts) <= LARGEST_RANK
    )


def forward(layer: Layer) -> tuple[Tensor, list[Tensor]]:
    """As `chunks.forward`."""
    layer = _contiguous(layer)
    mixed_TI = torch.empty_like(layer.frozen[0])
    lows = [layer.weights_TE.new_zeros(len(lora.A_RI), len(mixed_TI)) for lora in layer.experts]
    compiled.call("forward", ctypes.byref(_call(layer, mixed_TI, lows)))
    return mixed_TI, lows


def backward(
    layer: Layer, grad_mixed_TI: Tensor, grad_lows: Sequence[Tensor], weights_wanted: bool, wanted: Sequence[bool]
) -> Gradients:
    """As `chunks.backward`. Each thread sums up its own tokens; the sums are added in the threads' order."""
    layer, grad_mixed_TI = _contiguous(layer), grad_mixed_TI.contiguous()
    grad_lows = [grad.contiguous() for grad in grad_lows]
    num_frozen, threads = len(layer.frozen), torch.get_num_threads()
    grad_weights = torch.zeros_like(layer.weights_TE) if weights_wanted else None
    grad_frozen = [torch.empty_like(f_TI) for f_TI in layer.frozen]
    is_low = ([True, False] * num_frozen + [False]) * len(layer.experts)  # has a column per token, not a sum over them
    flat = [
        t.new_zeros(t.shape if low else (threads, *t.shape)) if is_wanted else None
        for t, low, is_wanted in zip(flat_of(layer.experts), is_low, wanted, strict=True)
    ]
    call = _call(layer, grad_mixed_TI, grad_lows)
    call.grad_weights = _at(grad_weights)
    for s, grad in enumerate(grad_frozen):
        call.grad_frozen[s] = _at(grad)
    for e, total in enumerate(by_expert(flat, num_frozen)):
        call.experts[e].grad_A = _at(total.A_RI)
        for s, (low, B) in enumerate(total.inputs):
            call.experts[e].grad_low[s], call.experts[e].grad_B[s] = _at(low), _at(B)
    compiled.call("backward", ctypes.byref(call))
    return Gradients(grad_weights, grad_frozen, [t if t is None or t.dim() == 2 else t.sum(dim=0) for t in flat])


def _contiguous(layer: Layer) -> Layer:
    flat = [t.contiguous() for t in flat_of(layer.experts)]
    return layer._replace(
        frozen=[f_TI.contiguous() for f_TI in layer.frozen],
        weights_TE=layer.weights_TE.contiguous(),
        experts=by_expert(flat, len(layer.frozen)),
    )


def _call(layer: Layer, mixed_TI: Tensor, lows: Sequence[Tensor]) -> _Layer:
    """Points to the tensors, which must outlive it."""
    experts = (_Expert * len(layer.experts))()
    for expert, lora, low in zip(experts, layer.experts, lows, strict=True):
        expert.rank, expert.A, expert.out_low = len(lora.A_RI), _at(lora.A_RI), _at(low)
        for s, (low_RT, B_RI) in enumerate(lora.inputs):
            expert.low[s], expert.B[s] = _at(low_RT), _at(B_RI)
    tokens, width = layer.frozen[0].shape
    call = _Layer(
        T=tokens, I=width, E=len(experts), S=len(layer.frozen), half=mixed_TI.dtype == torch.bfloat16,
        act=layer.act.in_c, all=layer.used == 1, threads=torch.get_num_threads(),
        weights=_at(layer.weights_TE), mixed=_at(mixed_TI), experts=experts,
    )  # fmt: skip
    for s, f_TI in enumerate(layer.frozen):
        call.frozen[s] = _at(f_TI)
    return call


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
