"""This module draws the values that training starts from."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from comigs.seeds import generator
from comigs.slots import Slot


def starting_tensors(
    shapes: Mapping[Slot, tuple[int, ...]], seed: int, client: str, router_start: float = 0.02
) -> dict[Slot, Tensor]:
    """Return a client's starting tensors, in float32 on the CPU.

    A is Kaiming-uniform with a = sqrt(5), that is U(-1/sqrt(in), 1/sqrt(in)). B and what is merged
    are zeros. The router is N(0, router_start), which starts close to uniform mixing.

    Generalists and attention are drawn from the run's seed alone, so all clients start alike;
    specialists and router from the client's own generator. A smaller rank gets the first rows of a
    larger one.
    """
    tensors = {}
    for slot, shape in shapes.items():
        if slot.matrix == "B" or slot.role == "merged":
            tensors[slot] = torch.zeros(shape)
            continue
        # Each slot has a generator of its own, so that its values do not depend on other slots.
        owner = client if slot.role in ("specialist", "router") else "all clients"
        random = generator(seed, "start", owner, str(slot))
        if slot.role == "router":
            values = random.normal(0, router_start, shape)
        else:
            bound = 1 / math.sqrt(shape[1])
            values = random.uniform(-bound, bound, shape)
        tensors[slot] = torch.from_numpy(values.astype("float32"))
    return tensors
