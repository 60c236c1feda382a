"""The entropy of a model's predictions says how sure the model is, and asks for no targets.

A router that lowers it (Tent, 2006.10726) learns from text whose right continuation nobody tells.

T tokens, C tokens of a chunk, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from comigs.client.loss import Windows, blocks_of_rows, hidden_states, sum_through_head


def sum_entropy(model: Any, windows: Windows) -> Tensor:
    """Return the entropy in nats of the model's next token, summed over tokens: a scalar.

    Of chats, these are the tokens that are learnt, as in `sum_cross_entropy`; what stands there is
    not looked at.
    """
    hidden_TD = hidden_states(model, windows).flatten(0, 1)
    if (learnt := windows.learnt) is not None:
        hidden_TD = hidden_TD[learnt]
    return sum_through_head(model, hidden_TD, _sum_nats)


def _sum_nats(chunk: slice, logits_CV: Tensor, dtype: torch.dtype, to_gradient: bool) -> Tensor:
    """Return the sum of H = -sum_v p_v log p_v, and turn the logits into its gradient.

    That is dH / dlogit_v = -p_v (log p_v + H).
    """
    total = torch.zeros((), dtype=dtype, device=logits_CV.device)
    for rows in blocks_of_rows(logits_CV):
        log_p = logits_CV[rows].to(dtype).log_softmax(dim=-1)
        p = log_p.exp()
        entropy = -(p * log_p).sum(dim=-1, keepdim=True)
        total += entropy.sum()
        if to_gradient:
            logits_CV[rows] = log_p.add_(entropy).mul_(p).neg_().to(logits_CV.dtype)
    return total
