"""Cross-entropy through a frozen head, a chunk of tokens at a time.

T tokens, C tokens of a chunk, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from comigs.experts import csrc
from comigs.experts.hidden_torch import even_slices

CHUNK = 1 << 24  # logits that exist at once: as bfloat16 32 MB
BLOCK = (
    1 << 17
)  # of them, what a CPU thread works on at a time: as float32 512 KB, which a core's second cache holds


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of -log p(target). The head is frozen, so the gradient to the hidden states is all that
    is kept.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, targets_T: Tensor, head: Any, vocabulary: int
    ) -> Tensor:
        total = torch.zeros(
            (),
            dtype=torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32,
            device=hidden_TD.device,
        )
        wants_grad = ctx.needs_input_grad[0]
        grad_TD = torch.empty_like(hidden_TD) if wants_grad else None
        for rows in even_slices(len(targets_T), CHUNK // vocabulary):
            h_CD = hidden_TD[rows].detach().requires_grad_(wants_grad)
            with torch.set_grad_enabled(wants_grad):
                logits_CV = head(h_CD)
            total += _sum_nats(logits_CV.detach(), targets_T[rows], total.dtype, wants_grad)
            if grad_TD is not None:
                (grad_TD[rows],) = torch.autograd.grad(logits_CV, h_CD, logits_CV.detach())
        ctx.save_for_backward(*([] if grad_TD is None else [grad_TD]))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_TD,) = ctx.saved_tensors
        return grad_TD * grads[0].to(grad_TD.dtype), None, None, None


def _sum_nats(
    logits_CV: Tensor, targets_C: Tensor, dtype: torch.dtype, to_gradient: bool
) -> Tensor:
    """Sum of -log p(target), computed in `dtype`. to_gradient: the logits become its gradient, p -
    [is target].
    """
    C, V = logits_CV.shape
    if csrc.takes(logits_CV) and dtype == torch.float32:
        return csrc.cross_entropy(logits_CV, targets_C, to_gradient).sum()
    blocks = even_slices(
        C, BLOCK * torch.get_num_threads() // V if logits_CV.device.type == "cpu" else C
    )
    buffer = logits_CV.new_empty(blocks[0].stop, V, dtype=dtype)
    targets_C1 = targets_C[:, None]
    chosen_C1 = logits_CV.gather(-1, targets_C1).to(dtype)
    log_norm_C1 = torch.empty_like(chosen_C1)
    for rows in blocks:
        p = buffer[: rows.stop - rows.start].copy_(logits_CV[rows])
        largest = p.amax(dim=-1, keepdim=True)
        norm = p.sub_(largest).exp_().sum(dim=-1, keepdim=True)
        log_norm_C1[rows] = norm.log() + largest
        if to_gradient:
            logits_CV[rows] = p.div_(norm).scatter_add_(
                -1, targets_C1[rows], torch.full_like(norm, -1)
            )
    return (log_norm_C1 - chosen_C1).sum()


def sum_cross_entropy(model: Any, inputs: Tensor, targets: Tensor) -> Tensor:
    """Sum over tokens of the nats of `targets` (B, L) given `inputs` (B, L), a scalar.

    Never holds more than CHUNK logits, and no gradient for the head, which is frozen.
    """
    hidden = model.base_model(input_ids=inputs, use_cache=False).last_hidden_state
    total: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden.flatten(0, 1), targets.flatten(), _head(model), model.config.vocab_size
    )
    return total


def _head(model: Any) -> Any:
    """From hidden states to logits, with the cap that some families put on them."""
    linear = model.get_output_embeddings()
    cap = getattr(model.config, "final_logit_softcapping", None)
    return linear if cap is None else lambda h: torch.tanh(linear(h) / cap) * cap
