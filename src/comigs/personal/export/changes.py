"""What makes a shared base personal, as LoRA with every scale in B: experts, router, attention.

The base that it is for is blank: as many copies of the MLP as there are experts, and a router of
zeros. The router then is a LoRA, too: of rank E, A its matrix and B the identity.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from comigs.errors import UserError
from comigs.experts.mixture import Mixture
from comigs.methods import lowrank
from comigs.methods.lowrank import Pair
from comigs.personal.export.source import Source
from comigs.personal.export.weights import scaled

INSTEAD = 'what does work: "gguf" and "transformers", which are merged'


def require_shareable(source: Source) -> None:
    """Raise UserError where a model is more than LoRA on copies of one base."""
    mixing = source.mixing
    if mixing.is_dense and not mixing.is_uniform:
        raise UserError(
            "the experts of this run have weights that no token changes, which are no LoRA on a "
            f"shared base; {INSTEAD}"
        )
    require_no_merged(source)


def require_no_merged(source: Source) -> None:
    """Raise UserError where a method merged whole matrices into the base."""
    if source.attachment.mixtures[0].bound.merged:
        raise UserError(
            f"{source.model.config.method} merges whole matrices into the base, which are no LoRA; "
            f"{INSTEAD}"
        )


def changes(source: Source, layer: int, routers: Sequence[Tensor]) -> dict[str, Pair]:
    """Return the LoRA of one block by the name of the part that each changes.

    Names are those of GGUF: "attn_q", "ffn_up", and for a mixture "ffn_up_exps", whose A and B are
    (E, R, in) and (E, out, R), and "ffn_gate_inp".
    """
    mixture = source.attachment.mixtures[layer]
    found: dict[str, Pair] = {}
    for site in ("gate", "up", "down"):
        if source.mixing.is_single:
            found[f"ffn_{site}"] = scaled(mixture.bound.experts[0], site)
        else:
            found[f"ffn_{site}_exps"] = together(mixture, site)
    if not source.mixing.is_uniform:
        router = routers[layer]
        found["ffn_gate_inp"] = (router, torch.eye(len(router)))
    names = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
    for site, lora in source.attachment.attention[layer].items():
        if lora.A is not None and lora.B is not None:
            found[names[site]] = (lora.A, lora.scale * lora.B)
    return found


def together(mixture: Mixture, site: str) -> Pair:
    """Return all experts' LoRA, (E, R, in) and (E, out, R), zeros where one has a smaller rank."""
    pairs = [scaled(expert, site) for expert in mixture.bound.experts]
    rank = max(len(A) for A, _ in pairs)
    padded = [lowrank.pad(pair, rank) for pair in pairs]
    return torch.stack([A for A, _ in padded]), torch.stack([B for _, B in padded])
