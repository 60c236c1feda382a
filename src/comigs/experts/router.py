"""This module decides which experts a token uses, with which weight, and how even their load is.

T tokens, E experts, K = top_k experts used per token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

LEAD = math.log(9)
"""How far the last expert of a gated router starts behind: beside one other, with a tenth of the
weight. That expert is frozen; the more weight it has, the slower those learn that are not
(decision 13).
"""


@dataclass(frozen=True)
class Routing:
    """A router's decision for the tokens of one forward pass of one block.

    logits_TE holds the router's logits, weights_TE the routing weights, and selected_TE (bool) the
    selection. Where the router is open to its last expert as far as `gate`, closed is the decision
    of one that does not know it. Weights are zero where an expert is selected by neither.
    """

    logits_TE: Tensor
    weights_TE: Tensor
    selected_TE: Tensor
    top_k: int
    gate: Tensor | None = None
    closed: Routing | None = None

    def of(self, tokens: Tensor | None) -> Routing:
        """Return the decision for the tokens of these numbers; None: for all."""
        if tokens is None:
            return self
        chosen = (self.logits_TE[tokens], self.weights_TE[tokens], self.selected_TE[tokens])
        closed = self.closed.of(tokens) if self.closed else None
        return Routing(*chosen, self.top_k, self.gate, closed)

    def choices(self) -> Tensor:
        """Return how many of all choices fall on each expert, (1, E), which sum to T.

        With a gate, (2, E): those of a router that is open, and of one that is closed.
        """
        counts_1E = self.selected_TE.sum(dim=0, keepdim=True).double() / self.top_k
        if self.closed is None:
            return counts_1E
        return torch.cat([counts_1E, F.pad(self.closed.choices(), (0, 1))])


def route(logits_TE: Tensor, top_k: int, chosen_by_TE: Tensor | None = None) -> Routing:
    """Return the token-choice top-k routing (CoMiGS, section 3).

    K >= 2: softmax over the K largest logits, so the weights sum to 1. K = 1: the largest of the
    softmax over all E, which is below 1 and so gives the router a gradient. chosen_by_TE: whose K
    largest it is, where not of the logits.
    """
    if top_k == logits_TE.shape[-1] > 1:  # nothing is left out
        selected_TE = torch.ones_like(logits_TE, dtype=torch.bool)
        weights_TE = logits_TE.softmax(dim=-1, dtype=torch.float32)
        return Routing(logits_TE, weights_TE, selected_TE, top_k)
    best_TK = (logits_TE if chosen_by_TE is None else chosen_by_TE).topk(top_k, dim=-1).indices
    selected_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter_(-1, best_TK, True)
    if top_k == 1:
        weights_TE = logits_TE.softmax(dim=-1).masked_fill(~selected_TE, 0.0)
    else:
        # The softmax is in float32 whatever the logits are, as the authors do it: runs in float64
        # then equal theirs to the last digits.
        chosen_TE = logits_TE.masked_fill(~selected_TE, -torch.inf)
        weights_TE = chosen_TE.softmax(dim=-1, dtype=torch.float32)
    return Routing(logits_TE, weights_TE, selected_TE, top_k)


def route_gated(logits_TE: Tensor, top_k: int, gate: Tensor) -> Routing:
    """Return the routing of a router that is open to its last expert as far as `gate`, in 0 to 1.

    The weights are (1 - gate) times those of a router that knows the other experts only, plus gate
    times those of one that knows all, where the last expert starts `LEAD` behind. Whether it is one
    of the K >= 2 of a token is decided without that, or else it would never be, nor learn to be.
    """
    others_TE = logits_TE[:, :-1]
    behind_TE = torch.cat([others_TE, logits_TE[:, -1:] - LEAD], dim=-1)
    of_all = route(behind_TE, top_k, chosen_by_TE=logits_TE if top_k > 1 else None)
    of_others = route(others_TE, min(top_k, others_TE.shape[1]))
    closed_TE = F.pad(of_others.weights_TE.to(of_all.weights_TE), (0, 1))
    weights_TE = torch.lerp(closed_TE, of_all.weights_TE, gate.to(closed_TE))
    return replace(of_all, weights_TE=weights_TE, gate=gate, closed=of_others)


POSITIONS: ContextVar[Tensor | None] = ContextVar("positions", default=None)
"""Where each token (B, L) stands in its own example, while windows of several are read."""


@contextmanager
def reading_examples(positions: Tensor | None) -> Iterator[None]:
    """Say inside that windows hold several examples, if they do, and where each token stands."""
    token = POSITIONS.set(positions)
    try:
        yield
    finally:
        POSITIONS.reset(token)


def routing_inputs(x_BLD: Tensor, routed_by: str) -> Tensor:
    """Return what the router reads for each token: (T, D), or (T, 1) for "client".

    "token": the MLP's input. "sequence": its mean over the tokens of the sequence up to this one,
    or of the example where a window has several, so that no token is routed by what follows it.
    "client": a constant, so that the router's weights are the logits.
    """
    if routed_by == "client":
        return x_BLD.new_ones(x_BLD.shape[:-1].numel(), 1)
    if routed_by == "sequence":
        x_BLD = _running_mean(x_BLD, POSITIONS.get())
    return x_BLD.reshape(-1, x_BLD.shape[-1])


def _running_mean(x_BLD: Tensor, positions_BL: Tensor | None) -> Tensor:
    """Return the mean of the tokens up to each one, from the start of its sequence or example."""
    sums_BLD, length = x_BLD.cumsum(dim=-2), x_BLD.shape[-2]
    counts = torch.arange(1, length + 1, device=x_BLD.device)[:, None]
    if positions_BL is not None:
        # What was summed before an example began is taken off again.
        starts_BL1 = (counts[:, 0] - 1 - positions_BL)[..., None]
        before_BLD = torch.cat([torch.zeros_like(x_BLD[:, :1]), sums_BLD], dim=1)
        sums_BLD = sums_BLD - before_BLD.gather(1, starts_BL1.expand_as(x_BLD))
        counts = positions_BL[..., None] + 1
    return sums_BLD / counts


def balance_loss(
    routing: Routing, generalist_share: float, densities: Tensor | None = None
) -> Tensor:
    """Return the load balance of one block, a scalar: E^2 * mean_e(p_e * density_e * factor_e).

    `generalist_share` is the load wanted on the first expert; 0 asks for an equal load on all.
    `densities` is the share of choices that fall on each expert, as `Routing.choices` counts them;
    None: of these tokens' choices. The loss is constant where K = E = 2. With a gate it is as far
    that of all experts as the gate is open, and else that of a router without the last one.
    """
    if densities is None:
        densities = routing.choices() / len(routing.selected_TE)
    loss = _balance_loss(routing, generalist_share, densities[0])
    if routing.closed is None or routing.gate is None:
        return loss
    closed = _balance_loss(routing.closed, generalist_share, densities[1, :-1])
    return torch.lerp(closed, loss, routing.gate.to(loss).squeeze())


def _balance_loss(routing: Routing, generalist_share: float, density_E: Tensor) -> Tensor:
    num_experts = routing.logits_TE.shape[-1]
    # An expert that is the only one has all of the load, whatever its share is to be.
    if num_experts == 1:
        return routing.logits_TE.new_ones(())
    # p is the weight that experts get. It has a gradient, and so moves the router.
    logits_TE, left_out_TE = routing.logits_TE, ~routing.selected_TE
    if routing.top_k == 1:
        p_E = logits_TE.softmax(dim=-1).masked_fill(left_out_TE, 0.0).mean(dim=0)
    else:
        p_E = logits_TE.masked_fill(left_out_TE, 0.0).softmax(dim=-1).mean(dim=0)
    # Density is how often they are chosen. It has no gradient, and says which p costs most. With
    # these factors, the loss is lowest where the first expert has the share that is wanted.
    factor_E = torch.ones_like(p_E)
    if generalist_share > 0:
        factor_E[0] = 1 / (generalist_share * num_experts)
        factor_E[1:] = (num_experts - 1) / ((1 - generalist_share) * num_experts)
    return num_experts**2 * (p_E * density_E.to(p_E) * factor_E).mean()
