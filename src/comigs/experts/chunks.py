"""The hidden layer of all experts in PyTorch: on any device, in any dtype, with any activation.

A chunk of tokens at a time, in a few buffers that stay in the processor's cache, and in float32 (float64 where the base
is), because element-wise work in bfloat16 is slower on a CPU, and less exact (docs/performance.md). Where a token uses
fewer experts than there are, an expert works on its own tokens only.

C tokens of a chunk, N of them that an expert works on; the other letters are layer.py's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from comigs.experts.layer import Gradients, Layer, by_expert, flat_of

CHUNK = 1 << 16  # numbers in a buffer, per CPU thread: as float32 256 KB, of which a core's second cache holds several
CHUNK_ELSEWHERE = 1 << 24  # on other devices, where it bounds the memory alone


def forward(layer: Layer) -> tuple[Tensor, list[Tensor]]:
    """sum_e w_e h_e (T, I), and each expert's A_e @ (w_e h_e)^T (R, T)."""
    act, used, frozen, weights_TE, experts = layer
    mixed_TI = torch.empty_like(frozen[0])
    lows = [weights_TE.new_zeros(len(lora.A_RI), len(mixed_TI)) for lora in experts]
    for rows, (mixed_CI, *buffers) in _chunks(mixed_TI, 3, weights_TE.dtype, used):
        mixed_CI.zero_()
        for e, (lora, at) in enumerate(zip(experts, _tokens(weights_TE, rows, used), strict=True)):
            h_NI, spare = at.rows_of(buffers)
            act.value(_z(frozen[0], lora.inputs[0], at, h_NI), spare)
            if len(frozen) == 2:
                h_NI *= _z(frozen[1], lora.inputs[1], at, spare)
            h_NI *= weights_TE[at.all, e, None]
            at.put(lows[e], lora.A_RI, h_NI.T)
            at.add(mixed_CI, h_NI)
        mixed_TI[rows] = mixed_CI
    return mixed_TI, lows


def backward(
    layer: Layer, grad_mixed_TI: Tensor, grad_lows: Sequence[Tensor], weights_wanted: bool, wanted: Sequence[bool]
) -> Gradients:
    """From the gradients to what `forward` returns; wanted: which of the experts' tensors, one after another."""
    act, used, frozen, weights_TE, experts = layer
    S = len(frozen)
    grad_weights = torch.zeros_like(weights_TE) if weights_wanted else None
    grad_frozen = [torch.empty_like(f_TI) for f_TI in frozen]
    flat = [t.new_zeros(t.shape) if w else None for t, w in zip(flat_of(experts), wanted, strict=True)]
    totals = by_expert(flat, S)
    for rows, buffers in _chunks(frozen[0], 3 + 2 * S, weights_TE.dtype, used):
        sums = buffers[:S]
        for sum_CI in sums:
            sum_CI.zero_()
        for e, (lora, at) in enumerate(zip(experts, _tokens(weights_TE, rows, used), strict=True)):
            a_NI, grad_z, grad_h, spare, *up = at.rows_of(buffers[S:])
            act.value_and_slope(_z(frozen[0], lora.inputs[0], at, a_NI), grad_z, spare)
            h_NI = torch.mul(a_NI, _z(frozen[1], lora.inputs[1], at, up[0]), out=spare) if up else a_NI
            w_N1, grad_low_RN, total = weights_TE[at.all, e, None], grad_lows[e][:, at.all], totals[e]
            grad_h.copy_(grad_mixed_TI[at.all]).addmm_(grad_low_RN.T, lora.A_RI)  # the gradient to w_e h_e
            if total.A_RI is not None:
                total.A_RI.addmm_(grad_low_RN * w_N1.T, h_NI)
            if grad_weights is not None:
                grad_weights[at.all, e] = torch.mul(grad_h, h_NI, out=spare).sum(dim=-1)
            grad_z *= grad_h.mul_(w_N1)
            grad_zs = [grad_z.mul_(up[0]), grad_h.mul_(a_NI)] if up else [grad_z]
            _add_grads(grad_zs, sums, lora.inputs, total.inputs, at)
        for grad_TI, sum_CI in zip(grad_frozen, sums, strict=True):
            grad_TI[rows] = sum_CI
    return Gradients(grad_weights, grad_frozen, flat)


@dataclass(frozen=True)
class _Tokens:
    """Tokens of a chunk that an expert works on. all: where they are among all tokens; here: in the chunk."""

    all: slice | Tensor
    here: slice | Tensor
    number: int

    def rows_of(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        """As many rows of each."""
        return [buffer[: self.number] for buffer in buffers]

    def put(self, low_RT: Tensor, a_RI: Tensor, b_IN: Tensor) -> None:
        """Write a product into the columns of these tokens."""
        if isinstance(self.all, Tensor):
            low_RT[:, self.all] = a_RI @ b_IN
        else:
            torch.mm(a_RI, b_IN, out=low_RT[:, self.all])

    def add(self, sum_CI: Tensor, part_NI: Tensor) -> None:
        """Add to the rows of these tokens."""
        if isinstance(self.here, Tensor):
            sum_CI.index_add_(0, self.here, part_NI)
        else:
            sum_CI += part_NI


def _tokens(weights_TE: Tensor, rows: slice, used: float) -> list[_Tokens]:
    """Of each expert; all of the chunk where every token uses every expert."""
    if used == 1:
        return [_Tokens(rows, slice(None), rows.stop - rows.start)] * weights_TE.shape[1]
    here = [weight_C.nonzero().squeeze(1) for weight_C in weights_TE[rows].unbind(dim=1)]
    return [_Tokens(rows.start + index, index, len(index)) for index in here]


def _chunks(like_TI: Tensor, num_buffers: int, dtype: torch.dtype, used: float) -> Iterator[tuple[slice, list[Tensor]]]:
    """The rows of each chunk of tokens, and buffers (C, I) to work in, of which an expert uses such a part."""
    numbers = CHUNK * torch.get_num_threads() / used if like_TI.device.type == "cpu" else CHUNK_ELSEWHERE
    slices = even_slices(len(like_TI), int(numbers) // like_TI.shape[1])
    buffers = like_TI.new_empty(num_buffers, slices[0].stop, like_TI.shape[1], dtype=dtype)
    for rows in slices:
        yield rows, list(buffers[:, : rows.stop - rows.start].unbind())


def even_slices(length: int, largest: int) -> list[slice]:
    """range(length) in pieces alike, as few as can be: a product of two rows takes as long as one of eighty."""
    size = math.ceil(length / math.ceil(length / max(1, largest)))
    return [slice(start, min(length, start + size)) for start in range(0, length, size)]


def _z(frozen_TI: Tensor, low_and_B: tuple[Tensor, Tensor], at: _Tokens, out: Tensor) -> Tensor:
    low_RT, B_RI = low_and_B
    return out.copy_(frozen_TI[at.all]).addmm_(low_RT[:, at.all].T, B_RI)


def _add_grads(
    grad_zs: Sequence[Tensor], sums: Sequence[Tensor], inputs: Sequence[tuple[Tensor, Tensor]],
    totals: Sequence[tuple[Tensor | None, Tensor | None]], at: _Tokens,
) -> None:  # fmt: skip
    """From each z's gradient (C, I): to the frozen product, to low^T and to B^T."""
    for grad_z, sum_CI, (low_RT, B_RI), (total_low, total_B) in zip(grad_zs, sums, inputs, totals, strict=True):
        at.add(sum_CI, grad_z)
        if total_low is not None:
            at.put(total_low, B_RI, grad_z.T)
        if total_B is not None:
            total_B.addmm_(low_RT[:, at.all], grad_z)
