"""This module computes the hidden layer of all experts in PyTorch: on any device, in any dtype.

It works on a chunk of tokens at a time, in a few buffers that stay in the processor's cache. It
works in float32 (float64 where the base is), because element-wise work in bfloat16 is slower on a
CPU, and less exact (docs/performance.md). Where a token uses fewer experts than there are, an
expert works on its own tokens only.

C tokens of a chunk, N of them that an expert works on; the other letters are hidden_layer.py's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from comigs.experts.hidden_layer import Gradients, HiddenLayer, Wanted

# Numbers in a buffer, per CPU thread: 256 KB as float32, of which a core's second cache holds
# several.
CHUNK = 1 << 16
# On other devices a buffer's size bounds the memory alone.
CHUNK_ELSEWHERE = 1 << 24


def forward(layer: HiddenLayer) -> tuple[Tensor, Tensor]:
    """Return sum_e w_e h_e (T, I), and all experts' (w_e h_e) @ A_e^T beside each other (T, R)."""
    weights_TE, act = layer.weights_TE, layer.settings.act
    mixed_TI = torch.empty_like(layer.frozen[0])
    low_TR = weights_TE.new_zeros(len(mixed_TI), len(layer.A_RI))
    for rows, (mixed_CI, *buffers) in _chunks(layer, num_buffers=3):
        mixed_CI.zero_()
        for e, ranks, at in _experts(layer, rows):
            h_NI, spare = at.rows_of(buffers)
            act.value(_z(layer, 0, ranks, at, h_NI), spare)
            # A gated MLP multiplies what the activation gives with its second product.
            if len(layer.frozen) == 2:
                h_NI *= _z(layer, 1, ranks, at, spare)
            h_NI *= weights_TE[at.all, e, None]
            low_TR[at.all, ranks] = h_NI @ layer.A_RI[ranks].T
            at.add(mixed_CI, h_NI)
        mixed_TI[rows] = mixed_CI
    return mixed_TI, low_TR


def backward(
    layer: HiddenLayer, grad_mixed_TI: Tensor, grad_low_TR: Tensor, wanted: Wanted
) -> Gradients:
    """Return the gradients, given those to what `forward` returns."""
    act, learns, S = layer.settings.act, layer.settings.learns, len(layer.frozen)
    weights_TE = layer.weights_TE
    grad_weights = torch.zeros_like(weights_TE) if wanted.weights_TE else None
    grad_low = torch.zeros_like(layer.low_TSR) if wanted.low_TSR else None
    grad_B = torch.zeros_like(layer.B_SRI) if wanted.B_SRI else None
    grad_A = torch.zeros_like(layer.A_RI) if wanted.A_RI else None
    grad_frozen = [torch.empty_like(f_TI) for f_TI in layer.frozen]
    for rows, buffers in _chunks(layer, num_buffers=3 + 2 * S):
        sums = buffers[:S]
        for sum_CI in sums:
            sum_CI.zero_()
        for e, ranks, at in _experts(layer, rows):
            # The expert's hidden layer was not kept, so it is computed anew, with its slope.
            a_NI, grad_z, grad_h, spare, *up = at.rows_of(buffers[S:])
            act.value_and_slope(_z(layer, 0, ranks, at, a_NI), grad_z, spare)
            h_NI = torch.mul(a_NI, _z(layer, 1, ranks, at, up[0]), out=spare) if up else a_NI

            # The gradient to w_e h_e comes from both results, and reaches A, w_e and h_e.
            w_N1, grad_low_NR = weights_TE[at.all, e, None], grad_low_TR[at.all, ranks]
            grad_h.copy_(grad_mixed_TI[at.all]).addmm_(grad_low_NR, layer.A_RI[ranks])
            if grad_A is not None and learns[e]:
                grad_A[ranks].addmm_((grad_low_NR * w_N1).T, h_NI)
            if grad_weights is not None:
                grad_weights[at.all, e] = torch.mul(grad_h, h_NI, out=spare).sum(dim=-1)

            # From h_e it goes through the activation to each z, and so to `low`, B and `frozen`.
            grad_z *= grad_h.mul_(w_N1)
            grad_zs = [grad_z.mul_(up[0]), grad_h.mul_(a_NI)] if up else [grad_z]
            for s, (grad_NI, sum_CI) in enumerate(zip(grad_zs, sums, strict=True)):
                at.add(sum_CI, grad_NI)
                if grad_low is not None:
                    grad_low[at.all, s, ranks] = grad_NI @ layer.B_SRI[s, ranks].T
                if grad_B is not None and learns[e]:
                    grad_B[s, ranks].addmm_(layer.low_TSR[at.all, s, ranks].T, grad_NI)
        for grad_TI, sum_CI in zip(grad_frozen, sums, strict=True):
            grad_TI[rows] = sum_CI
    return Gradients(grad_weights, grad_low, grad_B, grad_A, grad_frozen)


@dataclass(frozen=True)
class _Tokens:
    """The tokens of a chunk that an expert works on.

    `all` says where they are among all tokens, and `here` where they are in the chunk.
    """

    all: slice | Tensor
    here: slice | Tensor
    number: int

    def rows_of(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        """Return of each buffer as many rows as there are tokens."""
        return [buffer[: self.number] for buffer in buffers]

    def add(self, sum_CI: Tensor, part_NI: Tensor) -> None:
        """Add to the rows of these tokens."""
        if isinstance(self.here, Tensor):
            sum_CI.index_add_(0, self.here, part_NI)
        else:
            sum_CI += part_NI


def _experts(layer: HiddenLayer, rows: slice) -> Iterator[tuple[int, slice, _Tokens]]:
    """Yield each expert's number, where its ranks are, and its tokens among these rows."""
    for e, ranks in enumerate(layer.ranks()):
        if layer.used == 1:
            yield e, ranks, _Tokens(rows, slice(None), rows.stop - rows.start)
        else:
            here = layer.weights_TE[rows, e].nonzero().squeeze(1)
            yield e, ranks, _Tokens(rows.start + here, here, len(here))


def _z(layer: HiddenLayer, s: int, ranks: slice, at: _Tokens, out: Tensor) -> Tensor:
    """Write z_s of an expert's tokens into `out`, and return it."""
    out.copy_(layer.frozen[s][at.all])
    return out.addmm_(layer.low_TSR[at.all, s, ranks], layer.B_SRI[s, ranks])


def _chunks(layer: HiddenLayer, num_buffers: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """Yield the rows of each chunk of tokens, and buffers (C, I) to work in.

    Where an expert works on some of the tokens only, it uses that part of a buffer, so that chunks
    are larger.
    """
    like_TI = layer.frozen[0]
    numbers: float = CHUNK_ELSEWHERE
    if like_TI.device.type == "cpu":
        numbers = CHUNK * torch.get_num_threads() / layer.used
    slices = even_slices(len(like_TI), int(numbers) // like_TI.shape[1])
    shape = (num_buffers, slices[0].stop, like_TI.shape[1])
    buffers = like_TI.new_empty(shape, dtype=layer.weights_TE.dtype)
    for rows in slices:
        yield rows, list(buffers[:, : rows.stop - rows.start].unbind())


def even_slices(length: int, largest: int) -> list[slice]:
    """Cut range(length) into as few slices as can be, none above `largest`, of nearly one size.

    A product of two rows takes as long as one of eighty, so a small last slice would be waste.
    """
    size = math.ceil(length / math.ceil(length / max(1, largest)))
    return [slice(start, min(length, start + size)) for start in range(0, length, size)]
