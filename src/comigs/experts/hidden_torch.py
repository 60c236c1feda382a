"""This module computes the hidden layer of all experts in PyTorch: on any device, in any dtype.

It works on a chunk of tokens at a time, in a few buffers that stay in the processor's cache. It
works in float32 (float64 where the base is), because element-wise work in bfloat16 is slower on a
CPU, and less exact (docs/performance.md). On a CPU it works on one expert at a time; where a token
uses fewer experts than there are, an expert works on its own tokens only. On other devices it works
on all experts at once, for each call costs a launch there.

C tokens of a chunk, G experts at once, N tokens that they work on; the other letters are
hidden_layer.py's.
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
    act = layer.settings.act
    mixed_TI = torch.empty_like(layer.frozen[0])
    low_TR = layer.weights_TE.new_zeros(len(mixed_TI), len(layer.A_RI))
    for rows, (mixed_CI,), buffers in _chunks(layer, num_sums=1, num_buffers=2):
        for group in _groups(layer, rows):
            h_GNI, spare = group.rows_of(buffers)
            act.value(_z(layer, 0, group, h_GNI), spare)
            # A gated MLP multiplies what the activation gives with its second product.
            if len(layer.frozen) == 2:
                h_GNI *= _z(layer, 1, group, spare)
            h_GNI *= group.weights(layer)
            for h_NI, ranks in zip(h_GNI, group.ranks, strict=True):
                low_TR[group.all, ranks] = h_NI @ layer.A_RI[ranks].T
            group.add(mixed_CI, h_GNI)
        mixed_TI[rows] = mixed_CI
    return mixed_TI, low_TR


def backward(
    layer: HiddenLayer, grad_mixed_TI: Tensor, grad_low_TR: Tensor, wanted: Wanted
) -> Gradients:
    """Return the gradients, given those to what `forward` returns."""
    act, learns, S = layer.settings.act, layer.settings.learns, len(layer.frozen)
    grad_weights = torch.zeros_like(layer.weights_TE) if wanted.weights_TE else None
    grad_low = torch.zeros_like(layer.low_TSR) if wanted.low_TSR else None
    grad_B = torch.zeros_like(layer.B_SRI) if wanted.B_SRI else None
    grad_A = torch.zeros_like(layer.A_RI) if wanted.A_RI else None
    grad_frozen = [torch.empty_like(f_TI) for f_TI in layer.frozen]
    for rows, sums, buffers in _chunks(layer, num_sums=S, num_buffers=3 + S):
        for group in _groups(layer, rows):
            # The hidden layer was not kept, so it is computed anew, with the activation's slope.
            a_GNI, grad_z, grad_h, spare, *up = group.rows_of(buffers)
            act.value_and_slope(_z(layer, 0, group, a_GNI), grad_z, spare)
            h_GNI = torch.mul(a_GNI, _z(layer, 1, group, up[0]), out=spare) if up else a_GNI

            # The gradient to w_e h_e comes from both results, and reaches A, w_e and h_e.
            w_GN1 = group.weights(layer)
            grad_h.copy_(grad_mixed_TI[group.all])
            for g, ranks in enumerate(group.ranks):
                grad_low_NR = grad_low_TR[group.all, ranks]
                grad_h[g].addmm_(grad_low_NR, layer.A_RI[ranks])
                if grad_A is not None and learns[group.first + g]:
                    grad_A[ranks].addmm_((grad_low_NR * w_GN1[g]).T, h_GNI[g])
            if grad_weights is not None:
                grad_w_GN = torch.mul(grad_h, h_GNI, out=spare).sum(dim=-1)
                grad_weights[group.all, group.experts] = grad_w_GN.T

            # From h_e it goes through the activation to each z, and so to `low`, B and `frozen`.
            grad_z *= grad_h.mul_(w_GN1)
            grad_zs = [grad_z.mul_(up[0]), grad_h.mul_(a_GNI)] if up else [grad_z]
            for s, (grad_GNI, sum_CI) in enumerate(zip(grad_zs, sums, strict=True)):
                group.add(sum_CI, grad_GNI)
                for g, ranks in enumerate(group.ranks):
                    if grad_low is not None:
                        grad_low[group.all, s, ranks] = grad_GNI[g] @ layer.B_SRI[s, ranks].T
                    if grad_B is not None and learns[group.first + g]:
                        low_NR = layer.low_TSR[group.all, s, ranks]
                        grad_B[s, ranks].addmm_(low_NR.T, grad_GNI[g])
        for grad_TI, sum_CI in zip(grad_frozen, sums, strict=True):
            grad_TI[rows] = sum_CI
    return Gradients(grad_weights, grad_low, grad_B, grad_A, grad_frozen)


@dataclass(frozen=True)
class _Group:
    """Experts, from `first` on, and the tokens of a chunk that they work on.

    ranks: where each expert's are. `all` says where the tokens are among all, and `here` where they
    are in the chunk.
    """

    first: int
    ranks: Sequence[slice]
    all: slice | Tensor
    here: slice | Tensor
    number: int

    @property
    def experts(self) -> slice:
        """Where they are among all experts."""
        return slice(self.first, self.first + len(self.ranks))

    def rows_of(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        """Return of each buffer as many rows as there are tokens."""
        return [buffer[:, : self.number] for buffer in buffers]

    def weights(self, layer: HiddenLayer) -> Tensor:
        """Return the routing weights of the tokens, (G, N, 1)."""
        return layer.weights_TE[self.all, self.experts].T[:, :, None]

    def add(self, sum_CI: Tensor, part_GNI: Tensor) -> None:
        """Add to the rows of these tokens what all these experts made of them."""
        part_NI = part_GNI[0] if len(part_GNI) == 1 else part_GNI.sum(dim=0)
        if isinstance(self.here, Tensor):
            sum_CI.index_add_(0, self.here, part_NI)
        else:
            sum_CI += part_NI


def _groups(layer: HiddenLayer, rows: slice) -> Iterator[_Group]:
    """Yield the experts that are computed at once, and their tokens among these rows."""
    ranks, size = list(layer.ranks()), _experts_at_once(layer)
    for first in range(0, len(ranks), size):
        own = ranks[first : first + size]
        if layer.used == 1:
            yield _Group(first, own, rows, slice(None), rows.stop - rows.start)
        else:
            here = layer.weights_TE[rows, first].nonzero().squeeze(1)
            yield _Group(first, own, rows.start + here, here, len(here))


def _experts_at_once(layer: HiddenLayer) -> int:
    return 1 if layer.frozen[0].device.type == "cpu" else len(layer.settings.ranks)


def _z(layer: HiddenLayer, s: int, group: _Group, out_GNI: Tensor) -> Tensor:
    """Write z_s of the experts' tokens into `out_GNI`, and return it."""
    out_GNI.copy_(layer.frozen[s][group.all])
    for out_NI, ranks in zip(out_GNI, group.ranks, strict=True):
        out_NI.addmm_(layer.low_TSR[group.all, s, ranks], layer.B_SRI[s, ranks])
    return out_GNI


def _chunks(
    layer: HiddenLayer, num_sums: int, num_buffers: int
) -> Iterator[tuple[slice, list[Tensor], list[Tensor]]]:
    """Yield the rows of each chunk of tokens, sums (C, I) that are zero, and buffers (G, C, I) to
    work in.

    Where an expert works on some of the tokens only, it uses that part of a buffer, so that chunks
    are larger.
    """
    (T, width), G = layer.frozen[0].shape, _experts_at_once(layer)
    numbers: float = CHUNK_ELSEWHERE / G
    if layer.frozen[0].device.type == "cpu":
        numbers = CHUNK * torch.get_num_threads() / layer.used
    slices = even_slices(T, int(numbers) // width)
    size = slices[0].stop, width
    sums = layer.weights_TE.new_empty((num_sums, *size))
    buffers = layer.weights_TE.new_empty((num_buffers, G, *size))
    for rows in slices:
        number = rows.stop - rows.start
        yield rows, [*sums[:, :number].zero_()], [*buffers[:, :, :number]]


def even_slices(length: int, largest: int) -> list[slice]:
    """Cut range(length) into as few slices as can be, none above `largest`, of nearly one size.

    A product of two rows takes as long as one of eighty, so a small last slice would be waste.
    """
    if not length:
        return []
    size = math.ceil(length / math.ceil(length / max(1, largest)))
    return [slice(start, min(length, start + size)) for start in range(0, length, size)]
