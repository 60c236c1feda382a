"""Cross-entropy through a frozen head, a chunk of tokens at a time.

T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 1 << 23  # logits that exist at once, as float32 32 MB


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of -log p(target). The head is frozen, so the gradient to the hidden states is all that is kept."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, targets_T: Tensor, head: Any, vocabulary: int) -> Tensor:
        total = torch.zeros(
            (), dtype=torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32, device=hidden_TD.device
        )
        wants_grad = ctx.needs_input_grad[0]
        grad_TD = torch.empty_like(hidden_TD) if wants_grad else None
        size = max(1, CHUNK // vocabulary)
        for start in range(0, len(targets_T), size):
            rows = slice(start, start + size)
            h_CD = hidden_TD[rows].detach().requires_grad_(wants_grad)
            with torch.set_grad_enabled(wants_grad):
                logits_CV = head(h_CD).to(total.dtype)
                loss = F.cross_entropy(logits_CV, targets_T[rows], reduction="sum")
            if grad_TD is not None:
                (grad_TD[rows],) = torch.autograd.grad(loss, h_CD)
            total += loss.detach()
        ctx.save_for_backward(*([] if grad_TD is None else [grad_TD]))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_TD,) = ctx.saved_tensors
        return grad_TD * grads[0].to(grad_TD.dtype), None, None, None


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
