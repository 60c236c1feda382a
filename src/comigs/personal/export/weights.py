"""A personal model's weights as matrices: what each linear is with its LoRA merged into it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from comigs.experts.attach import Attachment
from comigs.experts.lora import LoraLinear
from comigs.experts.mixture import Expert, Mixture
from comigs.methods.lowrank import Pair


def matrix(linear: nn.Module) -> Tensor:
    """Return the weight of a linear as (out, in); transformers' Conv1D stores (in, out)."""
    weight: Tensor = linear.weight  # type: ignore[assignment]
    return weight if isinstance(linear, nn.Linear) else weight.T


def frozen_matrix(mixture: Mixture, site: str) -> Tensor:
    """Return the base's matrix (out, in) of an MLP site, with what a method merged into it."""
    name = mixture.architecture.mlp_linears()[site]
    weight = matrix(getattr(mixture.mlp, name))
    merged = mixture.bound.merged
    return weight + merged[site] if site in merged else weight


def scaled(expert: Expert, site: str) -> Pair:
    """Return an expert's A (R, in) and B (out, R) of an MLP site, its scale in B."""
    A = torch.cat([lora.A[site] for lora in expert.loras])
    return A, torch.cat([lora.scale * lora.B[site] for lora in expert.loras], dim=1)


def expert_matrices(mixture: Mixture, site: str) -> list[Tensor]:
    """Return every expert's matrix (out, in) of an MLP site, with its LoRA merged."""
    frozen, matrices = frozen_matrix(mixture, site), []
    for expert in mixture.bound.experts:
        A, B = scaled(expert, site)
        matrices.append(frozen + B @ A)
    return matrices


def attention_matrix(lora: LoraLinear) -> Tensor:
    """Return an attention linear's matrix (out, in), with its LoRA merged."""
    weight = matrix(lora.linear)
    if lora.merged is not None:
        weight = weight + lora.merged
    if lora.A is None or lora.B is None:
        return weight
    return weight + lora.scale * (lora.B @ lora.A)


def base_state(attachment: Attachment) -> Iterator[tuple[str, Tensor]]:
    """Return the base's own tensors by the names that they have without experts on it."""
    architecture = attachment.architecture
    moved = {f"{architecture.mlp}.mlp.": f"{architecture.mlp}."}
    moved |= {f"{path}.linear.": f"{path}." for path in architecture.attention.values()}
    for name, tensor in attachment.model.state_dict().items():
        plain = name
        if name.startswith(f"{architecture.blocks}."):
            for inside, outside in moved.items():
                plain = plain.replace(f".{inside}", f".{outside}", 1)
        yield plain, tensor
