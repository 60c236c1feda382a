"""This module holds the mixture, the heart of the method and of its speed.

T tokens, D model width, I MLP width, E experts, R LoRA rank. Expert e is the frozen MLP with its
own LoRA on each of the MLP's linears, and y_T = sum_e w_TE[e] * MLP_e(x_T). All experts share the
frozen weights, so each frozen matrix product is done once, however many experts there are:

    u_e = up(x) + dup_e(x),  h_e = act(u_e)  or  act(gate(x) + dgate_e(x)) * u_e,
    y   = down(sum_e w_e h_e) + sum_e w_e ddown_e(h_e).

The same function as the naive sum, exactly (checked against the authors' module and a naive
implementation).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comigs.bases.base import Architecture
from comigs.experts.activation import activation_of
from comigs.experts.hidden import mixed_hidden
from comigs.experts.hidden_layer import HiddenLayer, HiddenSettings
from comigs.experts.packed import PackedExperts
from comigs.experts.reading import Frozen, read
from comigs.experts.router import Routing, route, route_gated, routing_inputs
from comigs.experts.token import TokenMixture, mixture_in_c


class Lora(NamedTuple):
    """A LoRA of one block: site -> A (R, in), site -> B (out, R), and its scaling."""

    A: Mapping[str, Tensor]
    B: Mapping[str, Tensor]
    scale: float

    @property
    def rank(self) -> int:
        """The rank R."""
        return len(self.A["down"])


class Expert(NamedTuple):
    """An expert of one block is the frozen MLP with the sum of these LoRA."""

    loras: Sequence[Lora]

    @property
    def rank(self) -> int:
        """The rank of all its LoRA together."""
        return sum(lora.rank for lora in self.loras)

    @property
    def learns(self) -> bool:
        """Whether any of the expert's tensors wants a gradient."""
        tensors = [t for lora in self.loras for t in (*lora.A.values(), *lora.B.values())]
        return any(tensor.requires_grad for tensor in tensors)


@dataclass(frozen=True)
class BlockExperts:
    """This record holds what one client has in one block, and how tokens choose among it.

    Without `experts`, the frozen MLP works alone. `merged` maps a site to a frozen change
    (out, in) of that linear. `W_ED` is the router; without one, every expert weighs 1/E. `gate`
    (1,) is how far the router is open to the last expert; None: it is to all. `opening` (E,) is how
    far it is open to each expert, whose weight is as many times as large before all are made to sum
    to 1; None: to all. `top_k` experts are used by a token. `routed_by` is ExpertsSection.routing.
    """

    experts: Sequence[Expert] = ()
    merged: Mapping[str, Tensor] = field(default_factory=dict)
    W_ED: Tensor | None = None
    gate: Tensor | None = None
    opening: Tensor | None = None
    top_k: int = 1
    routed_by: str = "token"

    @property
    def loras(self) -> list[Lora]:
        """All experts' LoRA, one expert's after another's. Some may be part of several experts."""
        return [lora for expert in self.experts for lora in expert.loras]


class Mixture(nn.Module):
    """A mixture takes the place of a block's MLP and holds no tensor of its own.

    `bound` is the client that it works for; `bind` changes it. `inputs` are the sites that read x.
    `routing` is the decision of the last forward pass, None without a router. `one_token` is what
    it is bound to, laid out for one token at a time, or None.
    """

    def __init__(self, mlp: nn.Module, architecture: Architecture) -> None:
        super().__init__()
        self.mlp = mlp
        self.architecture = architecture
        device = next(iter(mlp.state_dict().values())).device
        self.act = activation_of(getattr(mlp, architecture.activation), device)
        self.inputs = [site for site in architecture.mlp_linears() if site != "down"]
        self.bound = BlockExperts()
        self.routing: Routing | None = None
        self.one_token: TokenMixture | None = None

    def bind(self, client: BlockExperts) -> None:
        """Point the mixture at this client."""
        self.bound = client
        self.routing = None
        self.one_token = None

    def lay_out(self, dtype: torch.dtype) -> None:
        """Lay out what it is bound to for one token at a time, where C can. dtype: of the base."""
        if self.bound.experts:
            names = self.architecture.mlp_linears()
            linears = {site: getattr(self.mlp, names[site]) for site in (*self.inputs, "down")}
            self.one_token = mixture_in_c(linears, self.act, self.packed(dtype), dtype)

    @property
    def chooses(self) -> bool:
        """Whether a token uses some of the experts only."""
        return self.bound.W_ED is not None and len(self.bound.experts) > self.bound.top_k

    def forward(self, x: Tensor) -> Tensor:
        own, x_TD = self.bound, x.reshape(-1, x.shape[-1])
        if not own.experts:
            return self.mlp(x)  # type: ignore[no-any-return]
        if self.one_token is not None and self.one_token.takes(x):
            return self.one_token(x, self.routing_weights(x))
        # Everything that is trained, and everything element-wise, is computed in float32 or more.
        # The experts' A's are below each other, so that one product serves all experts and inputs.
        frozen, low = read(x_TD, self._frozen_inputs(), self._stacked_a(self.inputs))
        dtype = torch.promote_types(frozen[0].dtype, torch.float32)
        weights_TE = self.routing_weights(x).to(dtype).expand(len(x_TD), -1)

        scales_R = torch.cat(
            [x_TD.new_full((lora.rank,), lora.scale, dtype=dtype) for lora in own.loras]
        )
        B_SRI = torch.cat([lora.B[site].T for site in self.inputs for lora in own.loras]).to(dtype)
        mixed_TI, low_TR = mixed_hidden(
            HiddenLayer(
                settings=self._hidden_settings(),
                weights_TE=weights_TE,
                low_TSR=low.to(dtype).unflatten(1, (len(frozen), -1)) * scales_R,
                B_SRI=B_SRI.unflatten(0, (len(frozen), -1)),
                A_RI=self._stacked_a(["down"]).to(dtype),
                frozen=frozen,
            )
        )

        # `down` is linear, so that its frozen part, too, is one product for all experts.
        y_TD = self.frozen_linear("down", mixed_TI)
        bias = getattr(self.mlp, self.architecture.down).bias
        if own.W_ED is not None and own.top_k == 1 and bias is not None:
            # Weights that sum to less than 1 leave as much less of the bias.
            y_TD = (y_TD + (weights_TE.sum(dim=-1, keepdim=True) - 1) * bias).to(y_TD.dtype)
        B_DR = torch.cat([lora.B["down"] for lora in own.loras], dim=1)
        low_TR = (low_TR * scales_R).to(y_TD.dtype)
        return torch.addmm(y_TD, low_TR, B_DR.T.to(y_TD.dtype)).view(x.shape)

    def routing_weights(self, x: Tensor) -> Tensor:
        """Return the weights (T, E) of x (..., L, D), or (1, E) without a router.

        The decision is kept in `routing`, for loss and record.
        """
        own = self.bound
        if own.W_ED is None:
            self.routing = None
            E = len(own.experts)
            return torch.full((1, E), 1 / E, device=x.device)
        # A choice between experts deserves full precision.
        with torch.autocast(x.device.type, enabled=False):
            read = routing_inputs(x.to(own.W_ED.dtype), own.routed_by)
            logits_TE = F.linear(read, own.W_ED)
            if own.opening is not None:
                logits_TE = logits_TE + own.opening.log()
            if own.gate is None:
                self.routing = route(logits_TE, own.top_k)
            else:
                self.routing = route_gated(logits_TE, own.top_k, own.gate)
        return self.routing.weights_TE

    def packed(self, dtype: torch.dtype) -> PackedExperts:
        """Return copies of what it is bound to. dtype: of the base."""
        # What is trained and element-wise is computed in float32 (float64 where the base is).
        precise = torch.promote_types(dtype, torch.float32)
        own = self.bound
        B_in = [lora.scale * lora.B[site].T for site in self.inputs for lora in own.loras]
        B_down = torch.cat([lora.scale * lora.B["down"].T for lora in own.loras])
        return PackedExperts(
            ranks=tuple(expert.rank for expert in own.experts),
            A_in_RD=self._stacked_a(self.inputs).to(dtype).contiguous(),
            B_SRI=torch.cat(B_in).to(precise).contiguous().unflatten(0, (len(self.inputs), -1)),
            A_RI=self._stacked_a(["down"]).to(precise).contiguous(),
            B_RD=B_down.to(dtype).contiguous(),
            W_ED=None if own.W_ED is None else own.W_ED.detach().clone(),
            gate=None if own.gate is None else own.gate.detach().clone(),
            merged={site: tensor.to(dtype, copy=True) for site, tensor in own.merged.items()},
            top_k=own.top_k,
            routed_by=own.routed_by,
        )

    def frozen_linear(self, site: str, x: Tensor) -> Tensor:
        """Return what the frozen linear of a site makes of x, with what was merged into it."""
        linear = getattr(self.mlp, self.architecture.mlp_linears()[site])
        y: Tensor = linear(x)
        if site not in self.bound.merged:
            return y
        return y + F.linear(x, self.bound.merged[site].to(x.dtype))

    def _frozen_inputs(self) -> list[Frozen]:
        names, merged = self.architecture.mlp_linears(), self.bound.merged
        return [Frozen(getattr(self.mlp, names[site]), merged.get(site)) for site in self.inputs]

    def _stacked_a(self, sites: Sequence[str]) -> Tensor:
        """Return the A's of all experts below each other, one site's after another's."""
        return torch.cat([lora.A[site] for site in sites for lora in self.bound.loras])

    def _hidden_settings(self) -> HiddenSettings:
        own = self.bound
        ranks = [expert.rank for expert in own.experts]
        learns = [expert.learns for expert in own.experts]
        used = len(ranks) if own.W_ED is None else own.top_k
        return HiddenSettings(self.act, ranks, learns, used)
