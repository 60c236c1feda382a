"""A personal model as a standard transformers model: a mixture of experts, or a dense one.

Experts are the base's MLP with their LoRA merged into it, the router is a linear without a bias,
attention is merged, and everything else is copied. Which standard architecture computes the same
follows from the base's family and from K, the experts that a token uses: Mixtral and Qwen3Moe with
`norm_topk_prob` make the K weights sum to 1, as ours do for K >= 2. Without it they stay as they
are, as ours do for K = 1. Where all tokens have the same weights, sum_e c_e MLP_e is one MLP that
is as wide as all of them, with c_e in its `down`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from comigs.errors import UserError
from comigs.experts.mixture import Mixture
from comigs.personal.export.distill import distilled_routers
from comigs.personal.export.source import Source
from comigs.personal.export.weights import (
    attention_matrix,
    base_state,
    expert_matrices,
    frozen_matrix,
)

INSTEAD = 'what does work: "peft" (every expert exactly) and "flat" (one LoRA, nearly)'
SPARSE = {"mixtral": "MixtralForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM",
          "qwen3_moe": "Qwen3MoeForCausalLM"}  # fmt: skip


def standard_model(source: Source, blank: bool = False, shared: bool = False) -> Any:
    """Build the standard model of a personal model, in float32 on the CPU.

    blank leaves every LoRA out: identical experts and a router of zeros, on which the LoRA of any
    client with as many experts can be put. shared keeps experts apart that could be one wider MLP
    because all weigh the same, so that they are LoRA on a blank model. Raises UserError where no
    architecture fits.
    """
    # Where no token changes the weights, one wider MLP is simpler than a mixture, and as exact.
    mixing = source.mixing
    apart = shared and mixing.is_uniform and not mixing.is_single
    if mixing.is_dense and not apart:
        config, state = _dense(source, blank)
    else:
        config, state = _sparse(source, blank)
    # load_base took the base's padding away, which windows of tokens have no use for.
    config.pad_token_id = source.base.tokenizer.pad_token_id
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(state, strict=True)
    model.tie_weights()
    model.set_attn_implementation("eager")
    model.generation_config = copy.deepcopy(source.base.model.generation_config)
    model.requires_grad_(False).eval()
    return model


def _dense(source: Source, blank: bool) -> tuple[Any, dict[str, Tensor]]:
    """Return config and tensors of the base's architecture, its MLPs as wide as all experts."""
    attachment, architecture = source.attachment, source.base.architecture
    weights_LE = source.mixing.weights_LE
    assert weights_LE is not None
    # An expert that no token of a block uses needs no place there.
    used = 1 if blank else int((weights_LE != 0).sum(dim=1).max())
    config = copy.deepcopy(source.base.model.config)
    state = dict(base_state(attachment))
    for layer, (mixture, weights_E) in enumerate(zip(attachment.mixtures, weights_LE, strict=True)):
        block = f"{architecture.blocks}.{layer}."
        _put_attention(state, source, layer, blank)
        if blank:
            continue
        # The weights go into `down`, which is linear, and biases count as often as their experts.
        chosen = weights_E.topk(used).indices.tolist()
        for site, name in architecture.mlp_linears().items():
            matrices = expert_matrices(mixture, site)
            bias = f"{block}{architecture.mlp}.{name}.bias"
            if site == "down":
                whole = torch.cat([weights_E[e] * matrices[e] for e in chosen], dim=1)
                if bias in state:
                    state[bias] = state[bias] * weights_E[chosen].sum()
            else:
                whole = torch.cat([matrices[e] for e in chosen])
                if bias in state:
                    state[bias] = state[bias].repeat(used)
            linear = getattr(mixture.mlp, name)
            state[f"{block}{architecture.mlp}.{name}.weight"] = _as_stored(whole, linear)
    width = frozen_matrix(attachment.mixtures[0], "up").shape[0] * used
    setattr(config, "n_inner" if config.model_type == "gpt2" else "intermediate_size", width)
    return config, state


def _sparse(source: Source, blank: bool) -> tuple[Any, dict[str, Tensor]]:
    """Return config and tensors of the mixture of experts that fits the base's family."""
    attachment, architecture = source.attachment, source.base.architecture
    config = sparse_config(source)
    routers = None if blank else routers_of(source)
    state = dict(base_state(attachment))
    for layer, mixture in enumerate(attachment.mixtures):
        mlp = f"{architecture.blocks}.{layer}.{architecture.mlp}"
        _put_attention(state, source, layer, blank)
        # The experts take the place of the base's MLP. transformers keeps gate and up in one.
        for name in architecture.mlp_linears().values():
            del state[f"{mlp}.{name}.weight"]
        gate, up, down = (_experts(mixture, site, blank) for site in ("gate", "up", "down"))
        state[f"{mlp}.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)  # (E, 2 I, D)
        state[f"{mlp}.experts.down_proj"] = down  # (E, D, I)
        E, D = len(down), down.shape[1]
        state[f"{mlp}.gate.weight"] = torch.zeros(E, D) if routers is None else routers[layer]
        if config.model_type == "qwen2_moe":
            state |= _no_shared_expert(mlp, D)
    return config, state


def _experts(mixture: Mixture, site: str, blank: bool) -> Tensor:
    """Return the matrices of all experts, (E, out, in)."""
    if blank:
        return frozen_matrix(mixture, site).repeat(len(mixture.bound.experts), 1, 1)
    return torch.stack(expert_matrices(mixture, site))


def _no_shared_expert(mlp: str, width: int) -> dict[str, Tensor]:
    """Return the shared expert that Qwen2Moe must have: one hidden unit, all zero."""
    return {
        f"{mlp}.shared_expert.gate_proj.weight": torch.zeros(1, width),
        f"{mlp}.shared_expert.up_proj.weight": torch.zeros(1, width),
        f"{mlp}.shared_expert.down_proj.weight": torch.zeros(width, 1),
        f"{mlp}.shared_expert_gate.weight": torch.zeros(1, width),
    }


def _put_attention(state: dict[str, Tensor], source: Source, layer: int, blank: bool) -> None:
    """Write a block's attention matrices, merged, over the base's."""
    if blank:
        return
    architecture = source.base.architecture
    for site, lora in source.attachment.attention[layer].items():
        name = f"{architecture.blocks}.{layer}.{architecture.attention[site]}.weight"
        state[name] = _as_stored(attention_matrix(lora), lora.linear)


def _as_stored(whole: Tensor, linear: torch.nn.Module) -> Tensor:
    """Return an (out, in) matrix as this kind of linear keeps it."""
    return whole if isinstance(linear, torch.nn.Linear) else whole.T


def routers_of(source: Source) -> list[Tensor]:
    """Return every block's router (E, D) without an offset, which may be one fitted to it."""
    if source.mixing.gated:
        return distilled_routers(source)
    if source.mixing.is_uniform:
        width = source.base.model.config.hidden_size
        return [torch.zeros(source.mixing.num_experts, width)] * len(source.attachment.mixtures)
    routers = [mixture.bound.W_ED for mixture in source.attachment.mixtures]
    return [router for router in routers if router is not None]


def sparse_config(source: Source) -> Any:
    """Return the mixture's config. Raises UserError naming what works where none fits."""
    mixing, base = source.mixing, source.base.model.config
    # First what no architecture does, whatever the family.
    if mixing.routing == "sequence":
        raise UserError(
            'routing = "sequence" weighs a token by the mean of those before it, which no standard '
            f"architecture does; {INSTEAD}"
        )
    if mixing.gated and (mixing.num_experts, mixing.top_k) != (2, 2):
        raise UserError(
            f"top_k = {mixing.top_k} of {mixing.num_experts} experts beside everybody's: only one "
            f"own expert and top_k = 2 are near a standard architecture; {INSTEAD}"
        )
    kind = _family(source)
    fields = AutoConfig.for_model(kind).to_dict()
    # What the base says and the other architecture knows is copied: a default may be wrong.
    own = {key: value for key, value in base.to_dict().items() if key in fields}
    for key in ("model_type", "architectures", "transformers_version", "dtype", "_name_or_path"):
        own.pop(key, None)
    own["num_experts_per_tok"] = mixing.top_k
    own["architectures"] = [SPARSE[kind]]
    # Mixtral renormalises always; the Qwen families say whether they do.
    if kind == "mixtral":
        return AutoConfig.for_model(kind, **own, num_local_experts=mixing.num_experts)
    own |= {"num_experts": mixing.num_experts, "norm_topk_prob": mixing.top_k > 1}
    own |= {"moe_intermediate_size": base.intermediate_size, "decoder_sparse_step": 1}
    own |= {"mlp_only_layers": []}
    own.pop("num_local_experts", None)
    if kind == "qwen2_moe":
        own |= {"shared_expert_intermediate_size": 1, "qkv_bias": base.model_type == "qwen2"}
    return AutoConfig.for_model(kind, **own)


def _family(source: Source) -> str:
    """Return the model_type of the mixture of experts for the base's family and K."""
    base, renormalised = source.base.model.config, source.mixing.top_k > 1
    family = base.model_type
    # Biases would be dropped in silence, and a window that slides otherwise would not be the same.
    if family in ("llama", "mistral"):
        biased = [key for key in ("attention_bias", "mlp_bias") if getattr(base, key, False)]
        if biased:
            raise UserError(
                f"{biased[0]}: Mixtral has no place for the biases of base {source.base.title}; "
                f"{INSTEAD}"
            )
        if renormalised:
            return "mixtral"
        if getattr(base, "sliding_window", None) is None:
            return "qwen2_moe"
    if family == "qwen2" and not getattr(base, "use_sliding_window", False):
        return "qwen2_moe"
    if family == "qwen3" and not getattr(base, "use_sliding_window", False):
        return "qwen3_moe"
    raise UserError(
        f'base {source.base.title} is of the family "{family}", which has no mixture of experts '
        f"that computes the same with top_k = {source.mixing.top_k}; {INSTEAD}"
    )
