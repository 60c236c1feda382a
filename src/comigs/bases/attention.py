"""Causal attention of whole windows in C (csrc/attention.c), registered with `transformers`.

A base with `base.attention = "auto"` uses it on CPUs. One token at a time, with a cache, goes to
torch's own attention, and so does whatever C is not written for.

B windows, H heads of queries, G heads of keys and values, L tokens, d numbers of a head.
"""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from comigs import csrc

NAME = "comigs"  # by which transformers knows it
LARGEST_HEAD = 256


def register() -> str:
    """Make the attention known to `transformers`, and return its name there."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def attend(  # noqa: PLR0913 (these are transformers' to choose)
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return what every query (B, H, L, d) reads of key and value (B, G, L, d): (B, L, H, d).

    attention_mask: (B or 1, 1, L, L), true where a query may read a key; None: of all before it.
    """
    if dropout or not takes(query, key, value, attention_mask):
        found, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
        return found, None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    result: Tensor = _Attention.apply(query, key, value, attention_mask, scale)  # type: ignore[no-untyped-call]
    return result, None


def takes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Return whether C is there, and written for these: whole windows of one size of head."""
    B, _, L, d = query.shape
    return (
        csrc.takes(query)
        and query.dtype == key.dtype == value.dtype
        and key.shape == value.shape == (B, key.shape[1], L, d)
        and L > 1
        and d <= LARGEST_HEAD
        and (mask is None or (mask.dtype == torch.bool and mask.shape[1:] == (1, L, L)))
    )


class _View(ctypes.Structure):
    """attention.c's `view`."""

    _fields_ = (("at", c_void_p), *((name, c_int64) for name in ("window", "head", "token")))


class _Call(ctypes.Structure):
    """attention.c's `call`."""

    _fields_ = (
        *((name, c_int64) for name in ("B", "H", "G", "L", "d", "half", "threads")),
        ("scale", c_double),
        *((name, _View) for name in ("q", "k", "v", "grad")),
        ("mask", c_void_p),
        ("mask_window", c_int64),
        *((name, c_void_p) for name in ("out", "log_sums")),
        *((name, c_void_p) for name in ("grad_q", "grad_k", "grad_v", "room")),
    )


class _Attention(torch.autograd.Function):
    """Attention that keeps each query's log of its sum, and makes the weights anew from it."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        B, H, L, d = q.shape
        q, k, v = (_adjacent(tensor) for tensor in (q, k, v))
        mask = None if mask is None else mask.contiguous()
        out, log_sums = q.new_empty(B, L, H, d), torch.empty(B, H, L)
        call = _call(q, k, v, mask, scale)
        call.out, call.log_sums = out.data_ptr(), log_sums.data_ptr()
        _run("attention_forward", call)
        ctx.save_for_backward(q, k, v, mask, log_sums)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, log_sums = ctx.saved_tensors
        (B, H, L, d), G = q.shape, k.shape[1]
        grad = _adjacent(grad.transpose(1, 2))
        grads = [q.new_empty(B, L, heads, d) for heads in (H, G, G)]
        call = _call(q, k, v, mask, ctx.scale)
        call.grad, call.log_sums = _view(grad), log_sums.data_ptr()
        call.grad_q, call.grad_k, call.grad_v = (found.data_ptr() for found in grads)
        _run("attention_backward", call)
        return (*(found.transpose(1, 2) for found in grads), None, None)


def _adjacent(tensor: Tensor) -> Tensor:
    """Return the tensor with a head's numbers next to each other."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _view(tensor: Tensor) -> _View:
    window, head, token, _ = tensor.stride()
    return _View(tensor.data_ptr(), window, head, token)


def _call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> _Call:
    """Return what attention.c is given. It points to the tensors, which must outlive it."""
    # Strides go with the addresses, so that heads are read where the linears left them.
    B, H, L, d = q.shape
    call = _Call(
        B=B,
        H=H,
        G=k.shape[1],
        L=L,
        d=d,
        half=q.dtype == torch.bfloat16,
        threads=torch.get_num_threads(),
        scale=scale,
        q=_view(q),
        k=_view(k),
        v=_view(v),
    )
    if mask is not None:
        call.mask, call.mask_window = mask.data_ptr(), L * L if len(mask) > 1 else 0
    return call


def _run(function: str, call: _Call) -> None:
    """Call attention.c, with room for each thread to work in."""
    room = torch.empty(call.threads, csrc.number("attention_room", call.L, call.d))
    call.room = room.data_ptr()
    csrc.call(function, ctypes.byref(call))
