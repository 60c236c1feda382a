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
from comigs.experts.activation import activation_of
from comigs.experts.hidden import mixed_hidden
from comigs.experts.layer import ExpertLora
from comigs.experts.router import Routing, opened, route, routing_inputs


@dataclass(frozen=True)
class Expert:
    """One expert's LoRA in one block: site -> A (R, in), site -> B (out, R), and its scaling.

    beside: experts whose LoRA is added to this one's, so that together they are a single expert ("sum" mixing).
    """

    A: dict[str, Tensor]
    B: dict[str, Tensor]
    scale: float
    beside: tuple[Expert, ...] = ()

    def a(self, site: str) -> Tensor:
        """A (R, in), the rows of those beside it below."""
        return torch.cat([e.A[site] for e in (self, *self.beside)]) if self.beside else self.A[site]

    def scaled_b(self, site: str, dtype: torch.dtype) -> Tensor:
        """scale * B (out, R), the columns of those beside it to the right."""
        parts = [e.scale * e.B[site] for e in (self, *self.beside)]
        return (torch.cat(parts, dim=-1) if self.beside else parts[0]).to(dtype)


class Mixture(nn.Module):
    """Takes the place of a block's MLP. Holds no tensor of its own: `experts` and `W_ED` are pointed at a client's.

    experts empty: the frozen MLP alone. W_ED None: every expert weighs 1/E (uniform mixing; E = 1: weight 1).
    open: how far the router is open to the last `len(open)` of the first `generalists` experts; None: it is to all.
    merged: site -> a frozen change (out, in) of that linear. routed_by: ExpertsSection.routing.
    routing: the decision of the last forward pass, None without a router.
    """

    def __init__(self, mlp: nn.Module, architecture: Architecture) -> None:
        super().__init__()
        self.mlp = mlp
        self.architecture = architecture
        self.act = activation_of(getattr(mlp, architecture.activation), next(mlp.parameters()).device)
        self.inputs = [site for site in architecture.mlp_linears() if site != "down"]
        self.experts: Sequence[Expert] = ()
        self.W_ED: Tensor | None = None
        self.open: Tensor | None = None
        self.generalists = 0
        self.merged: dict[str, Tensor] = {}
        self.top_k = 1
        self.routed_by = "token"
        self.routing: Routing | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.experts:
            return self.mlp(x)  # type: ignore[no-any-return]
        x_TD = x.reshape(-1, x.shape[-1])
        frozen = [self._frozen(site, x_TD) for site in self.inputs]
        dtype = torch.promote_types(frozen[0].dtype, torch.float32)  # of all that is trained and element-wise
        weights_TE = self._routing_weights(x).to(dtype).expand(len(x_TD), -1)

        # the A's of all experts and input linears are one product
        A_parts = [e.a(site) for e in self.experts for site in self.inputs]
        low_RT = iter(F.linear(x_TD, torch.cat(A_parts).to(x.dtype)).to(dtype).T.split([len(A) for A in A_parts]))
        experts = []
        for e in self.experts:
            inputs = [(next(low_RT), e.scaled_b(site, dtype).T.contiguous()) for site in self.inputs]
            experts.append(ExpertLora(inputs, e.a("down").to(dtype)))
        mixed_TI, lows_RT = mixed_hidden(self.act, frozen, weights_TE, experts, self._used())
        y_TD = self._frozen("down", mixed_TI)
        if self.W_ED is not None and self.top_k == 1:  # weights sum to less than 1, and so does the bias
            y_TD = self._rescale_bias(y_TD, weights_TE).to(y_TD.dtype)
        B_DR = torch.cat([e.scaled_b("down", y_TD.dtype) for e in self.experts], dim=-1)
        return torch.addmm(y_TD, lows_RT.T.to(y_TD.dtype), B_DR.T).view(x.shape)

    def _routing_weights(self, x: Tensor) -> Tensor:
        """x (..., L, D) -> (T, E), or (1, E) without a router; keeps the decision in `routing`, for loss and record."""
        if self.W_ED is None:
            self.routing = None
            return torch.full((1, len(self.experts)), 1 / len(self.experts), device=x.device)
        with torch.autocast(x.device.type, enabled=False):  # a choice between experts deserves full precision
            logits_TE = F.linear(routing_inputs(x.to(self.W_ED.dtype), self.routed_by), self.W_ED)
            self.routing = route(logits_TE, self.top_k)
            if self.open is not None:
                rest = slice(self.generalists - len(self.open), self.generalists)
                self.routing = opened(self.routing, rest, self.open)
        return self.routing.weights_TE

    def _used(self) -> int:
        """Experts that a token uses."""
        return len(self.experts) if self.W_ED is None else self.top_k

    def _frozen(self, site: str, x: Tensor) -> Tensor:
        linear = getattr(self.mlp, self.architecture.mlp_linears()[site])
        y: Tensor = linear(x)
        return y + F.linear(x, self.merged[site].to(x.dtype)) if site in self.merged else y

    def _rescale_bias(self, y_TD: Tensor, weights_TE: Tensor) -> Tensor:
        bias = getattr(self.mlp, self.architecture.down).bias
        return y_TD if bias is None else y_TD + (weights_TE.sum(dim=-1, keepdim=True) - 1) * bias
