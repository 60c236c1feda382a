"""The mixture: one frozen MLP, several LoRA experts, one router. The heart of the method and of its speed.

T tokens, D model width, I MLP width, E experts, R LoRA rank. Expert e is the frozen MLP with its own LoRA on each of
the MLP's linears, and y_T = sum_e w_TE[e] * MLP_e(x_T). All experts share the frozen weights, so each frozen matrix
product is done once, however many experts there are:

    u_e = up(x) + dup_e(x),  h_e = act(u_e)  or  act(gate(x) + dgate_e(x)) * u_e,
    y   = down(sum_e w_e h_e) + sum_e w_e ddown_e(h_e).

The same function as the naive sum, exactly (checked against the authors' module and a naive implementation).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comigs.bases.base import Architecture
from comigs.experts.router import Routing, route


@dataclass(frozen=True)
class Expert:
    """One expert's tensors in one block: site -> A (R, in), site -> B (out, R), and its LoRA scaling."""

    A: dict[str, Tensor]
    B: dict[str, Tensor]
    scale: float


class Mixture(nn.Module):
    """Takes the place of a block's MLP. Holds no tensor of its own: `experts` and `W_ED` are pointed at a client's.

    experts empty: the frozen MLP alone. W_ED None: every expert weighs 1/E (uniform mixing; E = 1: weight 1).
    routing: the decision of the last forward pass, None without a router.
    """

    def __init__(self, mlp: nn.Module, architecture: Architecture) -> None:
        super().__init__()
        self.mlp = mlp
        self.architecture = architecture
        self.experts: Sequence[Expert] = ()
        self.W_ED: Tensor | None = None
        self.top_k = 1
        self.routing: Routing | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.experts:
            return self.mlp(x)  # type: ignore[no-any-return]
        x_TD = x.reshape(-1, x.shape[-1])
        weights_TE = self._routing_weights(x_TD)
        hidden = self._hidden(x_TD)

        mixed_TI = weights_TE[:, 0, None] * hidden[0]
        for e, h_TI in enumerate(hidden[1:], start=1):
            mixed_TI = mixed_TI + weights_TE[:, e, None] * h_TI
        y_TD = self._frozen("down", mixed_TI)
        if self.W_ED is not None and self.top_k == 1:  # weights sum to less than 1, and so does the bias
            y_TD = self._rescale_bias(y_TD, weights_TE)

        lows = [  # (T, R) each: what expert e adds in `down`, before B
            weights_TE[:, e, None] * F.linear(h_TI, self._cast(expert.A["down"], h_TI))
            for e, (expert, h_TI) in enumerate(zip(self.experts, hidden, strict=True))
        ]
        ups = [expert.scale * expert.B["down"] for expert in self.experts]
        y_TD = y_TD + F.linear(torch.cat(lows, dim=-1), self._cast(torch.cat(ups, dim=-1), x_TD))
        return y_TD.view(x.shape)

    def _routing_weights(self, x_TD: Tensor) -> Tensor:
        """(T, E) in x's dtype; keeps the decision in `routing` for the balance loss and the record."""
        num_experts = len(self.experts)
        if self.W_ED is None:
            self.routing = None
            return x_TD.new_full((1, num_experts), 1 / num_experts)
        with torch.autocast(x_TD.device.type, enabled=False):  # a choice between experts deserves full precision
            self.routing = route(F.linear(x_TD.to(self.W_ED.dtype), self.W_ED), self.top_k)
        return self.routing.weights_TE.to(x_TD.dtype)

    def _hidden(self, x_TD: Tensor) -> list[Tensor]:
        """h_e (T, I) of each expert. The A's of all experts and both input linears are one product."""
        inputs = [site for site in self.architecture.mlp_linears() if site != "down"]
        A_RD = torch.cat([e.A[site] for site in inputs for e in self.experts])
        ranks = [e.A[site].shape[0] for site in inputs for e in self.experts]
        low = iter(torch.split(F.linear(x_TD, self._cast(A_RD, x_TD)), ranks, dim=-1))
        act = getattr(self.mlp, self.architecture.activation)
        pre: dict[str, list[Tensor]] = {}
        for site in inputs:
            frozen_TI = self._frozen(site, x_TD)
            pre[site] = [frozen_TI + F.linear(next(low), self._cast(e.scale * e.B[site], x_TD)) for e in self.experts]
        if "gate" in pre:
            return [act(g_TI) * u_TI for g_TI, u_TI in zip(pre["gate"], pre["up"], strict=True)]
        return [act(u_TI) for u_TI in pre["up"]]

    def _frozen(self, site: str, x: Tensor) -> Tensor:
        linear = getattr(self.mlp, self.architecture.mlp_linears()[site])
        return linear(x)  # type: ignore[no-any-return]

    def _rescale_bias(self, y_TD: Tensor, weights_TE: Tensor) -> Tensor:
        bias = getattr(self.mlp, self.architecture.down).bias
        return y_TD if bias is None else y_TD + (weights_TE.sum(dim=-1, keepdim=True) - 1) * bias

    @staticmethod
    def _cast(tensor: Tensor, like: Tensor) -> Tensor:
        return tensor.to(like.dtype)
