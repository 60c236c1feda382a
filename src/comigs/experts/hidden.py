"""The hidden layer of all experts as one autograd function that recomputes instead of storing.

Plain autograd would keep about five (T, I) tensors per expert and block for the backward pass. This keeps the frozen
products only, which all experts share, and rebuilds each expert's hidden layer from them when its turn comes: a chunk
of tokens at a time, in a few buffers that stay in the processor's cache, and in float32 (float64 where the base is),
because element-wise work in bfloat16 is slower on a CPU, and less exact (docs/performance.md). Where a token uses fewer
experts than there are, an expert works on its own tokens only.

T tokens, C tokens of a chunk, N of them that an expert works on, I MLP width, E experts, R LoRA rank (may differ
between experts).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from comigs.experts.activation import Activation

CHUNK = 1 << 16  # numbers in a buffer, per CPU thread: as float32 256 KB, of which a core's second cache holds several
CHUNK_ELSEWHERE = 1 << 24  # on other devices, where it bounds the memory alone


class ExpertLora(NamedTuple):
    """One expert's part: for each frozen product (low^T (R, T), scaled B^T (R, I)), and A (R, I) of `down`."""

    inputs: Sequence[tuple[Tensor, Tensor]]
    A_RI: Tensor


class MixedHidden(torch.autograd.Function):
    """(weights (T, E), frozen products, experts' tensors) -> (sum_e w_e h_e, all experts' A_e @ (w_e h_e)^T).

    With z_e = frozen + low_e @ B_e^T: h_e = act(z_e) of the only product, or act(gate's z_e) * (up's z_e) of two.
    Call through `mixed_hidden`.
    """

    @staticmethod
    def forward(
        ctx: Any, act: Activation, num_frozen: int, used: float, weights_TE: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.act, ctx.num_frozen, ctx.used = act, num_frozen, used
        ctx.save_for_backward(weights_TE, *tensors)
        frozen, experts = tensors[:num_frozen], _by_expert(tensors[num_frozen:], num_frozen)
        mixed_TI = torch.empty_like(frozen[0])
        lows = [weights_TE.new_zeros(len(lora.A_RI), len(mixed_TI)) for lora in experts]
        for rows, (mixed_CI, *buffers) in _chunks(mixed_TI, 3, weights_TE.dtype, used):
            mixed_CI.zero_()
            for e, (lora, at) in enumerate(zip(experts, _tokens(weights_TE, rows, used), strict=True)):
                h_NI, spare = at.rows_of(buffers)
                act.value(_z(frozen[0], lora.inputs[0], at, h_NI), spare)
                if num_frozen == 2:
                    h_NI *= _z(frozen[1], lora.inputs[1], at, spare)
                h_NI *= weights_TE[at.all, e, None]
                at.put(lows[e], lora.A_RI, h_NI.T)
                at.add(mixed_CI, h_NI)
            mixed_TI[rows] = mixed_CI
        return mixed_TI, torch.cat(lows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_mixed_TI, grad_lows = grads
        weights_TE, *tensors = ctx.saved_tensors
        S = ctx.num_frozen
        frozen, experts = tensors[:S], _by_expert(tensors[S:], S)
        per_expert = grad_lows.split([len(lora.A_RI) for lora in experts])
        wanted = ctx.needs_input_grad[3:]
        grad_weights = torch.zeros_like(weights_TE) if wanted[0] else None
        grad_frozen = [torch.empty_like(f_TI) for f_TI in frozen]
        flat = [t.new_zeros(t.shape) if w else None for t, w in zip(tensors[S:], wanted[1 + S :], strict=True)]
        totals = _by_expert(flat, S)
        for rows, buffers in _chunks(frozen[0], 3 + 2 * S, weights_TE.dtype, ctx.used):
            sums = buffers[:S]
            for sum_CI in sums:
                sum_CI.zero_()
            for e, (lora, at) in enumerate(zip(experts, _tokens(weights_TE, rows, ctx.used), strict=True)):
                a_NI, grad_z, grad_h, spare, *up = at.rows_of(buffers[S:])
                ctx.act.value_and_slope(_z(frozen[0], lora.inputs[0], at, a_NI), grad_z, spare)
                h_NI = torch.mul(a_NI, _z(frozen[1], lora.inputs[1], at, up[0]), out=spare) if up else a_NI
                w_N1, grad_low_RN, total = weights_TE[at.all, e, None], per_expert[e][:, at.all], totals[e]
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
        return (None, None, None, grad_weights, *grad_frozen, *flat)


def mixed_hidden(
    act: Activation, frozen: Sequence[Tensor], weights_TE: Tensor, experts: Sequence[ExpertLora], top_k: int
) -> tuple[Tensor, Tensor]:
    """Mixed hidden layer (T, I), and the experts' weighted low-rank inputs to `down` below each other (sum of R, T).

    frozen: up's product (T, I), or gate's and up's; all else is of one dtype, in which the work is done. top_k: so
    many of a token's weights are not zero; the others have no gradient.
    """
    # elsewhere, to ask which tokens are an expert's would make the processor wait for the device
    used = min(1.0, top_k / len(experts)) if weights_TE.device.type == "cpu" else 1.0
    flat = [t for lora in experts for t in (*(t for pair in lora.inputs for t in pair), lora.A_RI)]
    with torch.autocast(weights_TE.device.type, enabled=False):
        mixed: tuple[Tensor, Tensor] = MixedHidden.apply(act, len(frozen), used, weights_TE, *frozen, *flat)  # type: ignore[no-untyped-call]
    return mixed


def _by_expert(flat: Sequence[Any], num_frozen: int) -> list[ExpertLora]:
    size = 2 * num_frozen + 1
    parts = [flat[i : i + size] for i in range(0, len(flat), size)]
    return [ExpertLora(list(zip(p[:-1:2], p[1::2], strict=True)), p[-1]) for p in parts]


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
