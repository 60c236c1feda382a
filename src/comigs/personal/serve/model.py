"""One base on which rows of many clients run in one forward pass, each with its own experts and
router.

Frozen products are made once for all tokens. What a client adds is made for the tokens of its
rows alone, by the same functions as in training (`mixed_hidden`, `route`, `route_gated`).
Attention is made row by row, so a row never reads another row's keys, and no padding changes
its numbers.

T tokens of a pass, D model width, I MLP width, E experts, H heads, d width of a head, V
vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from comigs.bases.load import Base
from comigs.errors import UserError
from comigs.experts.activation import activation_of
from comigs.experts.hidden import mixed_hidden
from comigs.experts.hidden_layer import HiddenLayer, HiddenSettings
from comigs.experts.packed import PackedExperts, PackedLora
from comigs.experts.router import route, route_gated, routing_inputs
from comigs.experts.token import quicker
from comigs.personal.serve.rows import PASS, Group, Pass, Span, positions

ATTENTION = "comigs_rows"


class RowModel:
    """A base whose forward pass takes rows of several clients. `close` puts the base's own modules
    back.
    """

    def __init__(self, base: Base) -> None:
        """Take the place of the base's modules. Raises UserError for a base that is no such one."""
        _require_servable(base)
        self.base = base
        self.model = base.model
        self._undo: list[tuple[nn.Module, str, nn.Module]] = []
        self._attention = base.model.config._attn_implementation
        AttentionInterface.register(ATTENTION, rows_attention)
        base.model.set_attn_implementation(ATTENTION)
        architecture = base.architecture
        for layer, block in enumerate(base.model.get_submodule(architecture.blocks)):
            mixture = RowMixture(block.get_submodule(architecture.mlp), base, layer)
            self._replace(block, architecture.mlp, mixture)
            for site, path in architecture.attention.items():
                self._replace(block, path, RowLinear(block.get_submodule(path), base, layer, site))
        self._head = base.model.get_output_embeddings()
        self._head.forward = quicker(self._head, base.dtype) or self._head.forward

    def _replace(self, block: nn.Module, path: str, new: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        owner = block.get_submodule(parent)
        self._undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, new)

    @torch.inference_mode()
    def forward(self, this: Pass) -> Tensor:
        """Run the tokens of a pass; return the logits after the last token of each row, (rows, V),
        in float32.

        The rows are in the order of `this.spans`, and have read their tokens afterwards.
        """
        device = self.base.device
        last = torch.tensor([span.at.stop - 1 for span in this.spans], device=device)
        # The blocks below learn which row a token is of from this context, not from arguments.
        token = PASS.set(this)
        try:
            output = self.model(
                input_ids=torch.tensor([this.ids], device=device),
                position_ids=positions(this, device),
                use_cache=False,
                logits_to_keep=last,
            )
        finally:
            PASS.reset(token)
        for span in this.spans:
            span.row.length += span.at.stop - span.at.start
        logits: Tensor = output.logits[0].float()
        return logits

    def close(self) -> None:
        """Put the base's own modules and attention back, as if nothing had ever been attached."""
        del self._head.forward  # the class has its own
        while self._undo:
            owner, name, original = self._undo.pop()
            setattr(owner, name, original)
        self.model.set_attn_implementation(self._attention)


def _require_servable(base: Base) -> None:
    """Refuse a base whose rows in one pass would not be what each is alone. Raises UserError."""
    config, why = base.model.config, None
    # A long row of a pass would turn all rows' positions otherwise.
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "longrope":
        why = 'the rope_type "longrope", by which positions depend on how long a text is'
    # The attention of rows is torch's own, which knows no cap.
    if getattr(config, "attn_logit_softcapping", None) is not None:
        why = "a cap on its attention's scores (attn_logit_softcapping)"
    if why is not None:
        works = "it cannot be served or chatted with. `comigs generate` works"
        raise UserError(f"base {base.title}: has {why}; {works}")


class RowMixture(nn.Module):
    """Takes the place of a block's MLP: `Mixture`, with the experts of each token's own client."""

    def __init__(self, mlp: nn.Module, base: Base, layer: int) -> None:
        super().__init__()
        self.mlp = mlp
        self.layer = layer
        names = base.architecture.mlp_linears()
        linears = {site: getattr(mlp, name) for site, name in names.items()}
        self.inputs = [site for site in linears if site != "down"]
        self.bias: Tensor | None = linears["down"].bias
        self.linears = {at: quicker(own, base.dtype) or own for at, own in linears.items()}
        self.act = activation_of(getattr(mlp, base.architecture.activation), base.device)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (1, T, D) to (1, T, D)."""
        this, x_TD = PASS.get(), x[0]
        # The frozen products are the same for everybody: once, for all rows.
        frozen = [self.linears[site](x_TD) for site in self.inputs]
        mixed_TI = torch.empty_like(frozen[0])
        added = []
        # Each client's experts work on the tokens of its own rows.
        for group in this.groups:
            experts = group.client.blocks[self.layer].experts
            x_ND = x_TD[group.at]
            own = [
                self._merged(experts, site, x_ND, y[group.at])
                for site, y in zip(self.inputs, frozen, strict=True)
            ]
            weights_NE = self._routing_weights(experts, group, x_ND)
            if this.routes is not None:
                this.routes.append(weights_NE)
            mixed_TI[group.at], low_NR = self._hidden(experts, x_ND, weights_NE, own)
            added.append((group, experts, weights_NE, low_NR))
        # `down` is frozen too; then what each client adds to it.
        y_TD: Tensor = self.linears["down"](mixed_TI)
        for group, experts, weights_NE, low_NR in added:
            y_ND = self._merged(experts, "down", mixed_TI[group.at], y_TD[group.at])
            if experts.W_ED is not None and experts.top_k == 1:
                y_ND = self._rescale_bias(y_ND, weights_NE)
            y_TD[group.at] = torch.addmm(y_ND, low_NR.to(y_ND.dtype), experts.B_RD)
        return y_TD[None]

    def _hidden(
        self, experts: PackedExperts, x_ND: Tensor, weights_NE: Tensor, frozen: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the mixed hidden layer (N, I), and the experts' inputs to B of `down` (N, R)."""
        dtype = experts.A_RI.dtype
        low_NSR = F.linear(x_ND, experts.A_in_RD).to(dtype).unflatten(1, (len(frozen), -1))
        used = len(experts.ranks) if experts.W_ED is None else experts.top_k
        learns = [False] * len(experts.ranks)
        return mixed_hidden(
            HiddenLayer(
                settings=HiddenSettings(self.act, experts.ranks, learns, used),
                weights_TE=weights_NE.to(dtype),
                low_TSR=low_NSR,
                B_SRI=experts.B_SRI,
                A_RI=experts.A_RI,
                frozen=frozen,
            )
        )

    def _routing_weights(self, experts: PackedExperts, group: Group, x_ND: Tensor) -> Tensor:
        """Return the routing weights of one client's tokens (N, E)."""
        if experts.W_ED is None:
            E = len(experts.ranks)
            return torch.full((len(x_ND), E), 1 / E, device=x_ND.device)
        # A sequence is routed by what it has read so far, which is in other passes, too.
        read = x_ND.to(experts.W_ED.dtype)
        if experts.routed_by == "sequence":
            start = group.at.start
            parts = [
                self._running_mean(s, read[s.at.start - start : s.at.stop - start])
                for s in group.spans
            ]
            read = torch.cat(parts)
        else:
            read = routing_inputs(read[None], experts.routed_by)
        logits_NE = F.linear(read, experts.W_ED)
        if experts.gate is None:
            return route(logits_NE, experts.top_k).weights_TE
        return route_gated(logits_NE, experts.top_k, experts.gate).weights_TE

    def _running_mean(self, span: Span, x_ND: Tensor) -> Tensor:
        """Return the mean of what a row's router read up to each of N tokens; remember the sum."""
        sums = span.row.router_sums
        total_ND = x_ND.cumsum(dim=0)
        if self.layer in sums:
            total_ND = total_ND + sums[self.layer]
        sums[self.layer] = total_ND[-1]
        count_N = torch.arange(span.position + 1, span.position + 1 + len(x_ND), device=x_ND.device)
        return total_ND / count_N[:, None]

    def _merged(self, experts: PackedExperts, site: str, x_N: Tensor, y_N: Tensor) -> Tensor:
        """Return the frozen product with this client's frozen change of that linear, where it has
        one.
        """
        merged = experts.merged.get(site)
        return y_N if merged is None else y_N + F.linear(x_N, merged)

    def _rescale_bias(self, y_ND: Tensor, weights_NE: Tensor) -> Tensor:
        """Return `down`'s product with its bias weighted as its input is: K = 1 weights sum to less
        than 1.
        """
        if self.bias is None:
            return y_ND
        return y_ND + ((weights_NE.sum(dim=-1, keepdim=True) - 1) * self.bias).to(y_ND.dtype)


class RowLinear(nn.Module):
    """Takes the place of an attention linear: `LoraLinear`, with the LoRA of each token's own
    client.
    """

    def __init__(self, linear: nn.Module, base: Base, layer: int, site: str) -> None:
        super().__init__()
        self.linear = linear
        self.compute = quicker(linear, base.dtype) or linear.forward
        self.layer = layer
        self.site = site

    def forward(self, x: Tensor) -> Tensor:
        """Map x (1, T, in) to (1, T, out)."""
        y = self.compute(x)
        for group in PASS.get().groups:
            lora: PackedLora = group.client.blocks[self.layer].attention[self.site]
            x_N, y_N = x[0, group.at], y[0, group.at]
            if lora.merged is not None:
                y_N += F.linear(x_N, lora.merged)
            if lora.A is not None and lora.B is not None:
                y_N.addmm_(F.linear(x_N, lora.A), lora.B)
        return y


def rows_attention(  # noqa: PLR0913  transformers calls it so
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, sliding_window: int | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Return causal attention of each row to its own tokens, called as `transformers` does.

    query (1, H, T, d), key and value (1, H of keys, T, d) -> (1, T, H, d).
    """
    parts = []
    for span in PASS.get().spans:
        memory = span.row.memories[module.layer_idx]  # type: ignore[index]
        keys_HLd, values_HLd = memory.append(key[0, :, span.at], value[0, :, span.at])
        if sliding_window is not None and span.at.stop - span.at.start == 1:
            keys_HLd, values_HLd = keys_HLd[:, -sliding_window:], values_HLd[:, -sliding_window:]
        parts.append(_attend(query[0, :, span.at], keys_HLd, values_HLd, scaling, sliding_window))
    return torch.cat(parts, dim=1).transpose(0, 1)[None], None


def _attend(
    query_HNd: Tensor,
    keys_HLd: Tensor,
    values_HLd: Tensor,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """Return what the last N of L tokens read of all of them (H, N, d)."""
    H, N, d = query_HNd.shape
    L, shared = keys_HLd.shape[1], H // keys_HLd.shape[0]
    # One token: the heads that share a key are queries of one attention, and no key is copied.
    if N == 1:
        packed = query_HNd.reshape(keys_HLd.shape[0], shared, d)
        read = F.scaled_dot_product_attention(
            packed[None], keys_HLd[None], values_HLd[None], scale=scaling
        )
        return read[0].reshape(H, 1, d)
    # Several: each sees the tokens before it, and of these the last `sliding_window` alone.
    if shared > 1:
        keys_HLd, values_HLd = (
            keys_HLd.repeat_interleave(shared, 0),
            values_HLd.repeat_interleave(shared, 0),
        )
    mask = None
    if L > N or (sliding_window is not None and sliding_window < L):
        mask = torch.ones(N, L, dtype=torch.bool, device=query_HNd.device).tril(L - N)
        if sliding_window is not None:
            mask = mask.triu(L - N - sliding_window + 1)
    return F.scaled_dot_product_attention(
        query_HNd[None],
        keys_HLd[None],
        values_HLd[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
    )[0]
