"""The hidden layer of all experts as one autograd function that recomputes instead of storing.

Plain autograd would keep about five (T, I) tensors per expert and block for the backward pass. This keeps the frozen
products only, which all experts share, and rebuilds each expert's hidden layer from them when its turn comes.

T tokens, I MLP width, E experts, R LoRA rank (may differ between experts).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Activation = Callable[[Tensor], Tensor]


class MixedHidden(torch.autograd.Function):
    """(gate, up, weights, lows, B's, down A's) -> (sum_e w_e h_e (T, I), the experts' (w_e h_e) @ A_e^T side by side).

    h_e = act(gate + low_ge @ B_ge^T) * (up + low_ue @ B_ue^T), or act(up + low_ue @ B_ue^T) where gate is None.
    Call through `mixed_hidden`.
    """

    @staticmethod
    def forward(
        ctx: Any, act: Activation, gate_TI: Tensor | None, up_TI: Tensor, weights_TE: Tensor, *lora: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        experts = _by_expert(lora)
        ctx.act = act
        ctx.save_for_backward(gate_TI, up_TI, weights_TE, *lora)
        mixed_TI, lows = None, []
        for e, (low_g, B_g, low_u, B_u, A_d) in enumerate(experts):
            assert A_d is not None
            h_TI = (
                act(_plus(gate_TI, low_g, B_g)) * _plus(up_TI, low_u, B_u)
                if gate_TI is not None
                else act(_plus(up_TI, low_u, B_u))
            )
            h_TI *= weights_TE[:, e, None]
            lows.append(F.linear(h_TI, A_d))
            mixed_TI = _plus_equals(mixed_TI, h_TI)
        assert mixed_TI is not None
        return mixed_TI, torch.cat(lows, dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_mixed_TI, grad_lows = grads
        gate_TI, up_TI, weights_TE, *lora = ctx.saved_tensors
        experts = _by_expert(lora)
        grad_gate: Tensor | None = None
        grad_up: Tensor | None = None
        grad_weights = torch.empty_like(weights_TE)
        grad_lora: list[Tensor | None] = []
        per_expert = grad_lows.split([A_d.shape[0] for *_, A_d in experts], dim=-1)
        for e, ((low_g, B_g, low_u, B_u, A_d), grad_low) in enumerate(zip(experts, per_expert, strict=True)):
            wants = ctx.needs_input_grad[4 + 5 * e : 9 + 5 * e]
            u_TI = _plus(up_TI, low_u, B_u)
            pre_TI = u_TI if gate_TI is None else _plus(gate_TI, low_g, B_g)
            with torch.enable_grad():
                pre_TI.requires_grad_()
                a_TI = ctx.act(pre_TI)
            h_TI = a_TI.detach() if gate_TI is None else a_TI.detach() * u_TI

            w_T1 = weights_TE[:, e, None]
            inner_TI = torch.addmm(grad_mixed_TI, grad_low, A_d)  # gradient to w_e h_e
            grad_weights[:, e] = (inner_TI * h_TI).sum(dim=-1)
            grad_A_d = (w_T1 * grad_low).T @ h_TI if wants[4] else None
            grad_h = inner_TI.mul_(w_T1)
            (grad_pre,) = torch.autograd.grad(a_TI, pre_TI, grad_h if gate_TI is None else grad_h * u_TI)
            grad_u = grad_pre if gate_TI is None else grad_h.mul_(a_TI.detach())

            grad_lora += [None, None] if gate_TI is None else _lora_grads(grad_pre, low_g, B_g, wants[:2])
            grad_lora += [*_lora_grads(grad_u, low_u, B_u, wants[2:4]), grad_A_d]
            grad_up = _plus_equals(grad_up, grad_u)
            grad_gate = None if gate_TI is None else _plus_equals(grad_gate, grad_pre)
        return (None, grad_gate, grad_up, grad_weights, *grad_lora)


def mixed_hidden(
    act: Activation, gate_TI: Tensor | None, up_TI: Tensor, weights_TE: Tensor,
    gate_lora: Sequence[tuple[Tensor, Tensor]], up_lora: Sequence[tuple[Tensor, Tensor]], down_A: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mixed hidden layer (T, I), and the experts' weighted low-rank inputs to `down` side by side (T, sum of R).

    gate_lora, up_lora: per expert (low (T, R), B (I, R)), with B scaled. down_A: per expert (R, I). All of one dtype.
    """
    flat: list[Tensor | None] = []
    for e, A_RI in enumerate(down_A):
        flat += [*(gate_lora[e] if gate_lora else (None, None)), *up_lora[e], A_RI]
    return MixedHidden.apply(act, gate_TI, up_TI, weights_TE, *flat)  # type: ignore[no-any-return, no-untyped-call]


def _by_expert(lora: Sequence[Any]) -> list[tuple[Any, ...]]:
    return [tuple(lora[i : i + 5]) for i in range(0, len(lora), 5)]


def _plus(frozen_TI: Tensor, low_TR: Tensor, B_IR: Tensor) -> Tensor:
    return torch.addmm(frozen_TI, low_TR, B_IR.T)


def _plus_equals(total: Tensor | None, part: Tensor) -> Tensor:
    """The sum so far, in the first part's memory: nobody else needs it any more."""
    return part if total is None else total.add_(part)


def _lora_grads(grad_TI: Tensor, low_TR: Tensor, B_IR: Tensor, wants: Sequence[bool]) -> list[Tensor | None]:
    return [grad_TI @ B_IR if wants[0] else None, grad_TI.T @ low_TR if wants[1] else None]
