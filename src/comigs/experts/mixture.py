"""The mixture: one frozen MLP, several LoRA experts, one router. The heart of the method and of its
speed.

T tokens, D model width, I MLP width, E experts, R LoRA rank. Expert e is the frozen MLP with its
own LoRA on each of the MLP's linears, and y_T = sum_e w_TE[e] * MLP_e(x_T). All experts share the
frozen weights, so each frozen matrix product is done once, however many experts there are:

    u_e = up(x) + dup_e(x),  h_e = act(u_e)  or  act(gate(x) + dgate_e(x)) * u_e,
    y   = down(sum_e w_e h_e) + sum_e w_e ddown_e(h_e).

The same function as the naive sum, exactly (checked against the authors' module and a naive
implementation).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comigs.bases.base import Architecture
from comigs.experts.activation import activation_of
from comigs.experts.hidden import mixed_hidden
from comigs.experts.router import Routing, opened, route, routing_inputs


class Expert(NamedTuple):
    """One expert's LoRA in one block: site -> A (R, in), site -> B (out, R), and its scaling."""

    A: dict[str, Tensor]
    B: dict[str, Tensor]
    scale: float


class Mixture(nn.Module):
    """Takes the place of a block's MLP. Holds no tensor of its own: `experts` and `W_ED` are
    pointed at a client's.

    experts empty: the frozen MLP alone. W_ED None: every expert weighs 1/E (uniform mixing; E = 1:
    weight 1).
    summed: the experts are a single one, whose LoRA is the sum of theirs.
    open: (1,), how far the router is open to the last expert; None: it is to all.
    merged: site -> a frozen change (out, in) of that linear. routed_by: ExpertsSection.routing.
    routing: the decision of the last forward pass, None without a router.
    """

    def __init__(self, mlp: nn.Module, architecture: Architecture) -> None:
        super().__init__()
        self.mlp = mlp
        self.architecture = architecture
        self.act = activation_of(
            getattr(mlp, architecture.activation), next(mlp.parameters()).device
        )
        self.inputs = [site for site in architecture.mlp_linears() if site != "down"]
        self.experts: Sequence[Expert] = ()
        self.summed = False
        self.W_ED: Tensor | None = None
        self.open: Tensor | None = None
        self.merged: dict[str, Tensor] = {}
        self.top_k = 1
        self.routed_by = "token"
        self.routing: Routing | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.experts:
            return self.mlp(x)  # type: ignore[no-any-return]
        x_TD = x.reshape(-1, x.shape[-1])
        frozen = [self._frozen(site, x_TD) for site in self.inputs]
        dtype = torch.promote_types(
            frozen[0].dtype, torch.float32
        )  # of all that is trained and element-wise
        weights_TE = self._routing_weights(x).to(dtype).expand(len(x_TD), -1)

        scales_R = torch.cat(
            [x_TD.new_full(e.A["down"].shape[:1], e.scale, dtype=dtype) for e in self.experts]
        )
        low = F.linear(x_TD, self._stacked_a(self.inputs).to(x.dtype)).to(dtype)
        low_TSR = low.unflatten(1, (len(frozen), -1)) * scales_R
        B_SRI = torch.cat([e.B[site].T for site in self.inputs for e in self.experts]).to(dtype)
        mixed_TI, low_TR = mixed_hidden(
            self.act, *self._ranks(), self._used(), weights_TE,
            low_TSR, B_SRI.unflatten(0, (len(frozen), -1)), self._stacked_a(["down"]).to(dtype), frozen,
        )  # fmt: skip
        y_TD = self._frozen("down", mixed_TI)
        if (
            self.W_ED is not None and self.top_k == 1
        ):  # weights sum to less than 1, and so does the bias
            y_TD = self._rescale_bias(y_TD, weights_TE).to(y_TD.dtype)
        B_DR = torch.cat([e.B["down"] for e in self.experts], dim=1)
        return torch.addmm(y_TD, (low_TR * scales_R).to(y_TD.dtype), B_DR.T.to(y_TD.dtype)).view(
            x.shape
        )

    def _stacked_a(self, sites: Sequence[str]) -> Tensor:
        """A's of all experts below each other, one site's after another's."""
        return torch.cat([e.A[site] for site in sites for e in self.experts])

    def _ranks(self) -> tuple[list[int], list[bool]]:
        """Of each that a token may choose; and whether it learns."""
        ranks = [len(e.A["down"]) for e in self.experts]
        learns = [
            any(t.requires_grad for t in (*e.A.values(), *e.B.values())) for e in self.experts
        ]
        return ([sum(ranks)], [any(learns)]) if self.summed else (ranks, learns)

    def _routing_weights(self, x: Tensor) -> Tensor:
        """x (..., L, D) -> (T, E), or (1, E) without a router; keeps the decision in `routing`, for
        loss and record.
        """
        if self.W_ED is None:
            self.routing = None
            E = 1 if self.summed else len(self.experts)
            return torch.full((1, E), 1 / E, device=x.device)
        with torch.autocast(
            x.device.type, enabled=False
        ):  # a choice between experts deserves full precision
            logits_TE = F.linear(routing_inputs(x.to(self.W_ED.dtype), self.routed_by), self.W_ED)
            if self.open is None:
                self.routing = route(logits_TE, self.top_k)
            else:
                self.routing = opened(logits_TE, self.top_k, self.open)
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
