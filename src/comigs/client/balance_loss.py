"""A batch has one balance loss, whatever pieces it is worked on in.

A block's loss multiplies an expert's density, the share of the batch's choices that fall on it, by
the mean weight it is given. Density has no gradient, but it is the whole batch's: where the batch
comes in pieces, it must be known before the first piece goes backward.

L blocks, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from comigs.client.loss import Windows, autocast, hidden_states
from comigs.experts.attach import Attachment
from comigs.experts.router import Routing, balance_loss


def batch_densities(
    attachment: Attachment, pieces: Sequence[Windows], dtype: torch.dtype
) -> list[Tensor] | None:
    """Return each block's density over all pieces, as `Routing.choices` counts it.

    None: one piece knows its own density, and where every token uses all experts it is 1 / E.
    """
    if len(pieces) == 1 or not any(mixture.chooses for mixture in attachment.mixtures):
        return None
    return mean_over_pieces(attachment, pieces, dtype, Routing.choices)


def mean_over_pieces(
    attachment: Attachment,
    pieces: Sequence[Windows],
    dtype: torch.dtype,
    sum_over_tokens: Callable[[Routing], Tensor],
) -> list[Tensor]:
    """Return each block's mean over the tokens of all pieces, by a forward pass without gradients.

    sum_over_tokens: what a piece adds to it, with E last.
    """
    sums: list[Tensor] = []
    tokens = 0
    for piece in pieces:
        with torch.no_grad(), autocast(dtype, piece.inputs.device):
            hidden_states(attachment.model, piece)
        routings = attachment.routings(piece.learnt)
        tokens += len(routings[0].selected_TE)
        own = [sum_over_tokens(routing) for routing in routings]
        sums = [a + b for a, b in zip(sums, own, strict=True)] if sums else own
    return [total / tokens for total in sums]


def mean_balance_loss(
    routings: Sequence[Routing], generalist_share: float, densities: list[Tensor] | None = None
) -> Tensor:
    """Return the mean over blocks of their balance loss, a scalar.

    It is zero without a router. densities: of the whole batch, where it has several pieces; the
    mean of the pieces' losses, each by its tokens, is then the whole batch's.
    """
    if not routings:
        return torch.zeros(())
    given: Sequence[Tensor | None] = densities or [None] * len(routings)
    terms = []
    for routing, density in zip(routings, given, strict=True):
        terms.append(balance_loss(routing, generalist_share, density))
    return torch.stack(terms).mean()
