"""At the very end a client may keep one part of its model alone, where its valid says so.

Routers have no bias, so that no router can give one expert all of the weight for every token. A
model in which every expert is the same one can: where the weights of a token sum to 1, as they do
with two experts or more for a token, that is this expert alone, whatever the router says. Beside
the others' generalists a router has a gate, which can be closed to them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from comigs.methods.method import Finished, Nats, Tensors

EXPERTS = ("generalist", "specialist", "rest")


def best_on_valid(tensors: Tensors, nats: Nats) -> Finished:
    """Return the model that is best by `nats`: the whole, a part of it alone, or the base.

    A part is each expert with the attention LoRA, and the attention LoRA without any expert. Of
    models that are equally good the first stays, which is the whole.
    """
    return min(candidates(tensors), key=lambda model: nats(model[0]))


def most_candidates(num_parts: int) -> int:
    """Return how many models `best_on_valid` measures at most, of experts of so many parts."""
    return num_parts + 3


def candidates(tensors: Tensors) -> Iterator[Finished]:
    """Yield the whole model, each expert alone, the attention LoRA alone, and the base."""
    yield tensors, None
    if any(slot.is_gate for slot in tensors):
        yield from beside_others(tensors)
    else:
        for role in EXPERTS[:2]:
            for part in parts_of(tensors, role):
                expert_alone = with_every_expert(tensors, part)
                if expert_alone is not None:
                    yield expert_alone, f"{role} {part[1:]}"
    yield without(tensors, EXPERTS), "attention LoRA"
    yield without(tensors, (*EXPERTS, "attention")), "base"


def beside_others(tensors: Tensors) -> Iterator[Finished]:
    """Yield each of a client's own experts alone, its generalists alone, and the others' alone."""
    gates = {slot: torch.zeros_like(t) for slot, t in tensors.items() if slot.is_gate}
    own = {**tensors, **gates}
    # An own expert is the generalists with a specialist on top, and so is each where all are one.
    for part in parts_of(tensors, "specialist"):
        specialists = {slot: own[slot] for slot in own if slot.role == "specialist"}
        copies = {slot: own[replace(slot, part=part)] for slot in specialists}
        yield {**own, **copies}, f"own expert {part[1:]}"
    generalists = without(own, ("specialist",))
    yield generalists, "generalists"
    # The others' expert is their generalists, of all their ranks.
    others, parts = dict(generalists), parts_of(tensors, "generalist")
    for number, part in enumerate(parts):
        for slot in [slot for slot in own if slot.part == part]:
            whole = own[replace(slot, part="rest")]
            others[slot] = whole.chunk(len(parts), dim=0 if slot.matrix == "A" else 1)[number]
    yield others, "everybody's generalists"


def parts_of(tensors: Tensors, role: str) -> list[str]:
    """Return the parts of this role, in the order of their names."""
    return sorted({slot.part for slot in tensors if slot.role == role})


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
