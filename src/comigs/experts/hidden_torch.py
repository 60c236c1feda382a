"""The hidden layer of all experts in PyTorch: on any device, in any dtype, with any activation.

A chunk of tokens at a time, in a few buffers that stay in the processor's cache, and in float32
(float64 where the base is), because element-wise work in bfloat16 is slower on a CPU, and less
exact (docs/performance.md). Where a token uses fewer experts than there are, an expert works on its
own tokens only.

C tokens of a chunk, N of them that an expert works on; the other letters are layer.py's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from comigs.experts.layer import Gradients, Layer

CHUNK = (
    1 << 16
)  # numbers in a buffer, per CPU thread: as float32 256 KB, of which a core's second cache holds several
CHUNK_ELSEWHERE = 1 << 24  # on other devices, where it bounds the memory alone


def forward(layer: Layer) -> tuple[Tensor, Tensor]:
    """sum_e w_e h_e (T, I), and all experts' (w_e h_e) @ A_e^T (T, R)."""
    frozen, weights_TE = layer.frozen, layer.weights_TE
    mixed_TI = torch.empty_like(frozen[0])
    low_TR = weights_TE.new_zeros(len(mixed_TI), len(layer.A_RI))
    for rows, (mixed_CI, *buffers) in _chunks(mixed_TI, 3, weights_TE.dtype, layer.used):
        mixed_CI.zero_()
        for e, (ranks, at) in enumerate(
            zip(layer.rows(), _tokens(weights_TE, rows, layer.used), strict=True)
        ):
            h_NI, spare = at.rows_of(buffers)
            layer.act.value(_z(layer, 0, ranks, at, h_NI), spare)
            if len(frozen) == 2:
                h_NI *= _z(layer, 1, ranks, at, spare)
            h_NI *= weights_TE[at.all, e, None]
            low_TR[at.all, ranks] = h_NI @ layer.A_RI[ranks].T
            at.add(mixed_CI, h_NI)
        mixed_TI[rows] = mixed_CI
    return mixed_TI, low_TR


def backward(
    layer: Layer, grad_mixed_TI: Tensor, grad_low_TR: Tensor, wanted: Sequence[bool]
) -> Gradients:
    """From the gradients to what `forward` returns; wanted: to the weights, low, B and A."""
    frozen, weights_TE = layer.frozen, layer.weights_TE
    S = len(frozen)
    grad_weights, grad_low, grad_B, grad_A = (
        torch.zeros_like(t) if is_wanted else None
        for t, is_wanted in zip(layer[4:8], wanted, strict=True)
    )
    grad_frozen = [torch.empty_like(f_TI) for f_TI in frozen]
    for rows, buffers in _chunks(frozen[0], 3 + 2 * S, weights_TE.dtype, layer.used):
        sums = buffers[:S]
        for sum_CI in sums:
            sum_CI.zero_()
        for e, (ranks, at) in enumerate(
            zip(layer.rows(), _tokens(weights_TE, rows, layer.used), strict=True)
        ):
            a_NI, grad_z, grad_h, spare, *up = at.rows_of(buffers[S:])
            layer.act.value_and_slope(_z(layer, 0, ranks, at, a_NI), grad_z, spare)
            h_NI = torch.mul(a_NI, _z(layer, 1, ranks, at, up[0]), out=spare) if up else a_NI
            w_N1, grad_low_NR = weights_TE[at.all, e, None], grad_low_TR[at.all, ranks]
            grad_h.copy_(grad_mixed_TI[at.all]).addmm_(
                grad_low_NR, layer.A_RI[ranks]
            )  # the gradient to w_e h_e
            if grad_A is not None and layer.learns[e]:
                grad_A[ranks].addmm_((grad_low_NR * w_N1).T, h_NI)
            if grad_weights is not None:
                grad_weights[at.all, e] = torch.mul(grad_h, h_NI, out=spare).sum(dim=-1)
            grad_z *= grad_h.mul_(w_N1)
            grad_zs = [grad_z.mul_(up[0]), grad_h.mul_(a_NI)] if up else [grad_z]
            for s, (grad_NI, sum_CI) in enumerate(zip(grad_zs, sums, strict=True)):
                at.add(sum_CI, grad_NI)
                if grad_low is not None:
                    grad_low[at.all, s, ranks] = grad_NI @ layer.B_SRI[s, ranks].T
                if grad_B is not None and layer.learns[e]:
                    grad_B[s, ranks].addmm_(layer.low_TSR[at.all, s, ranks].T, grad_NI)
        for grad_TI, sum_CI in zip(grad_frozen, sums, strict=True):
            grad_TI[rows] = sum_CI
    return Gradients(grad_weights, grad_low, grad_B, grad_A, grad_frozen)


@dataclass(frozen=True)
class _Tokens:
    """Tokens of a chunk that an expert works on. all: where they are among all tokens; here: in the
    chunk.
    """

    all: slice | Tensor
    here: slice | Tensor
    number: int

    def rows_of(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        """As many rows of each."""
        return [buffer[: self.number] for buffer in buffers]

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


def _chunks(
    like_TI: Tensor, num_buffers: int, dtype: torch.dtype, used: float
) -> Iterator[tuple[slice, list[Tensor]]]:
    """The rows of each chunk of tokens, and buffers (C, I) to work in, of which an expert uses such
    a part.
    """
    numbers = (
        CHUNK * torch.get_num_threads() / used if like_TI.device.type == "cpu" else CHUNK_ELSEWHERE
    )
    slices = even_slices(len(like_TI), int(numbers) // like_TI.shape[1])
    buffers = like_TI.new_empty(num_buffers, slices[0].stop, like_TI.shape[1], dtype=dtype)
    for rows in slices:
        yield rows, list(buffers[:, : rows.stop - rows.start].unbind())


def even_slices(length: int, largest: int) -> list[slice]:
    """range(length) in pieces alike, as few as can be: a product of two rows takes as long as one
    of eighty.
    """
    size = math.ceil(length / math.ceil(length / max(1, largest)))
    return [slice(start, min(length, start + size)) for start in range(0, length, size)]


def _z(layer: Layer, s: int, ranks: slice, at: _Tokens, out: Tensor) -> Tensor:
    return out.copy_(layer.frozen[s][at.all]).addmm_(
        layer.low_TSR[at.all, s, ranks], layer.B_SRI[s, ranks]
    )
