"""Which experts a token uses, with which weight, and how evenly the load is spread.

T tokens, E experts, K = top_k experts used per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

LEAD = math.log(9)
"""How far the last expert of an `opened` router starts behind: beside one other, with a tenth of the weight.

It is frozen. The more weight it has, the slower those learn that are not (decision 13).
"""


@dataclass(frozen=True)
class Routing:
    """The router's decision for the tokens of one forward pass of one block.

    logits_TE: router logits. weights_TE: routing weights, zero where not selected. selected_TE:
    bool.
    """

    logits_TE: Tensor
    weights_TE: Tensor
    selected_TE: Tensor
    top_k: int


def route(logits_TE: Tensor, top_k: int) -> Routing:
    """Token-choice top-k routing (CoMiGS, section 3).

    K >= 2: softmax over the K largest logits, so the weights sum to 1. K = 1: the largest of the
    softmax over all E, which is below 1 and so gives the router a gradient.
    """
    best_TK = logits_TE.topk(top_k, dim=-1).indices
    selected_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter_(-1, best_TK, True)
    if top_k == 1:
        weights_TE = logits_TE.softmax(dim=-1).masked_fill(~selected_TE, 0.0)
    else:
        # float32 whatever the logits are, as the authors do: float64 runs then equal theirs to the
        # last digits
        weights_TE = logits_TE.masked_fill(~selected_TE, -torch.inf).softmax(
            dim=-1, dtype=torch.float32
        )
    return Routing(logits_TE, weights_TE, selected_TE, top_k)


def opened(logits_TE: Tensor, top_k: int, open: Tensor) -> Routing:
    """`route` whose weights are only so far open, from 0 to 1, to the last expert, which starts
    `LEAD` behind.

    (1 - open) times the weights of a router that knows the others only, plus open times those of
    one that knows all.
    """
    others_TE = logits_TE[:, :-1]
    routing = route(torch.cat([others_TE, logits_TE[:, -1:] - LEAD], dim=-1), top_k)
    weights_TE = route(others_TE, min(top_k, others_TE.shape[1])).weights_TE.to(routing.weights_TE)
    closed_TE = torch.nn.functional.pad(weights_TE, (0, 1))
    return replace(
        routing, weights_TE=torch.lerp(closed_TE, routing.weights_TE, open.to(closed_TE))
    )


def routing_inputs(x_BLD: Tensor, routing: str) -> Tensor:
    """What the router reads for each token, (T, D), or (T, 1) for "client".

    "token": the MLP's input. "sequence": its mean over the tokens of the sequence up to this one,
    so that no token is routed by what follows it. "client": a constant, so that the router's
    weights are the logits.
    """
    if routing == "client":
        return x_BLD.new_ones(x_BLD.shape[:-1].numel(), 1)
    if routing == "sequence":
        count_L1 = torch.arange(1, x_BLD.shape[-2] + 1, device=x_BLD.device)[:, None]
        x_BLD = x_BLD.cumsum(dim=-2) / count_L1
    return x_BLD.reshape(-1, x_BLD.shape[-1])


def balance_loss(routing: Routing, generalist_share: float) -> Tensor:
    """Load balance of one block, a scalar (METHOD: E^2 * mean_e(p_e * density_e * factor_e)).

    generalist_share: load wanted on the first expert; 0 asks for an equal load on all. Constant
    where K = E = 2.
    """
    num_experts = routing.logits_TE.shape[-1]
    if routing.top_k == 1:
        p_E = routing.weights_TE.mean(dim=0)
    else:
        p_E = routing.logits_TE.masked_fill(~routing.selected_TE, 0.0).softmax(dim=-1).mean(dim=0)
    density_E = routing.selected_TE.to(p_E.dtype).mean(dim=0) / routing.top_k
    factor_E = torch.ones_like(p_E)
    if generalist_share > 0:
        factor_E[0] = 1 / (generalist_share * num_experts)
        factor_E[1:] = (num_experts - 1) / ((1 - generalist_share) * num_experts)
    return num_experts**2 * (p_E * density_E * factor_E).mean()
