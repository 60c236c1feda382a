"""What a step minimises of a model, beside the balance loss: the objective.

It is the cross-entropy of the text, but for the phases of a router whose client has no valid to
learn from (`client.router_data`): there it may be the entropy of the predictions, or the
cross-entropy on train and a pull towards the mean routing weights of similar clients.

T tokens, L blocks, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from comigs.client.balance_loss import mean_over_pieces
from comigs.client.entropy import sum_entropy
from comigs.client.loss import Windows, sum_cross_entropy
from comigs.config import ClientSection
from comigs.experts.attach import Attachment
from comigs.experts.router import Routing

LEAST = 1e-6  # of a mean routing weight whose logarithm is taken


@dataclass(frozen=True)
class Objective:
    """An objective is a sum of nats over tokens, and how far routers are held to a prior.

    sum_nats(model, windows): the sum. prior_LE: mean routing weights, each block's summing to 1;
    None: nothing holds the router. prior_coef: the weight of the distance from the prior.
    """

    sum_nats: Callable[[Any, Windows], Tensor] = sum_cross_entropy
    prior_LE: Tensor | None = None
    prior_coef: float = 0.0

    def batch_weights(
        self, attachment: Attachment, pieces: Sequence[Windows], dtype: torch.dtype
    ) -> list[Tensor] | None:
        """Return each block's mean routing weights (E,) over all pieces of a batch.

        None: there is no prior to hold them against, or one piece, which knows its own.
        """
        if self.prior_LE is None or len(pieces) == 1:
            return None
        return mean_over_pieces(attachment, pieces, dtype, lambda r: r.weights_TE.sum(dim=0))

    def distance(self, routings: Sequence[Routing], batch_weights: list[Tensor] | None) -> Tensor:
        """Return prior_coef times the mean over blocks of KL(prior || mean routing weights).

        Where a batch comes in pieces, it is a function of the piece whose gradients, each by its
        tokens, sum to that of the whole batch.
        """
        if self.prior_LE is None:
            return torch.zeros(())
        terms = []
        for number, (routing, prior_E) in enumerate(zip(routings, self.prior_LE, strict=True)):
            mean_E = routing.weights_TE.mean(dim=0)
            if batch_weights is None:
                terms.append(kl_divergence(prior_E, mean_E))
                continue
            # The divergence of the whole batch, as a straight line through where it stands.
            whole_E = batch_weights[number].to(mean_E).requires_grad_()
            with torch.enable_grad():
                (slope_E,) = torch.autograd.grad(kl_divergence(prior_E, whole_E), whole_E)
            terms.append((slope_E * mean_E).sum())
        return self.prior_coef * torch.stack(terms).mean()


CROSS_ENTROPY = Objective()


def objective_of(client: ClientSection, prior_LE: Tensor | None) -> Objective:
    """Return what a router's phases minimise.

    prior_LE: as it came from the server; None before there is any.
    """
    if client.router_data == "entropy":
        return Objective(sum_entropy)
    if client.router_data == "prior" and prior_LE is not None:
        return Objective(prior_LE=prior_LE, prior_coef=client.prior_coef)
    return CROSS_ENTROPY


def kl_divergence(prior_E: Tensor, mean_E: Tensor) -> Tensor:
    """Return KL(prior || mean), a scalar with gradient to the mean, which is taken to sum to 1."""
    prior_E = prior_E.to(mean_E)
    kept_E = (mean_E / mean_E.sum()).clamp(min=LEAST)
    return (torch.xlogy(prior_E, prior_E) - torch.xlogy(prior_E, kept_E)).sum()
