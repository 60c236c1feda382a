"""At the very end a client may keep one part of its model alone, where its valid says so.

Routers have no bias, so that no router can give one expert all of the weight for every token. A
model in which every expert is the same one can: where the weights of a token sum to 1, as they do
with two experts or more for a token, that is this expert alone, whatever the router says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from comigs.methods.method import Nats, Tensors

EXPERTS = ("generalist", "specialist", "rest")


def best_on_valid(tensors: Tensors, nats: Nats) -> Tensors:
    """Return the model that is best by `nats`: the whole, a part of it alone, or the base.

    A part is each expert with the attention LoRA, and the attention LoRA without any expert. Of
    models that are equally good the first stays, which is the whole.
    """
    return min(candidates(tensors), key=nats)


def most_candidates(num_experts: int) -> int:
    """Return how many models `best_on_valid` measures at most."""
    return num_experts + 3


def candidates(tensors: Tensors) -> Iterator[Tensors]:
    """Yield the whole model, each expert alone, the attention LoRA alone, and the base."""
    yield tensors
    parts = sorted({slot.part for slot in tensors if slot.role in EXPERTS})
    for part in parts:
        expert_alone = with_every_expert(tensors, part)
        if expert_alone is not None:
            yield expert_alone
    yield without(tensors, EXPERTS)
    yield without(tensors, (*EXPERTS, "attention"))


def with_every_expert(tensors: Tensors, part: str) -> Tensors | None:
    """Return the tensors with each expert a copy of one; None where their ranks differ."""
    copies = dict(tensors)
    for slot, tensor in tensors.items():
        if slot.role in EXPERTS:
            copies[slot] = tensors[replace(slot, part=part)]
            if copies[slot].shape != tensor.shape:
                return None
    return copies


def without(tensors: Tensors, roles: tuple[str, ...]) -> Tensors:
    """Return the tensors with no LoRA of these roles: their B is zero."""
    silent = dict(tensors)
    for slot, tensor in tensors.items():
        if slot.role in roles and slot.matrix == "B":
            silent[slot] = torch.zeros_like(tensor)
    return silent
