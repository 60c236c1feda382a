"""The values training starts from: shared tensors are the same for all clients, private ones a
client's own.
"""

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
    """A: Kaiming-uniform with a = sqrt(5), that is U(-1/sqrt(in), 1/sqrt(in)); B and what is
    merged: zeros; router:
    N(0, router_start), which starts close to uniform mixing. float32, on the CPU.

    Generalists and attention are drawn from the run's seed alone, so all clients start alike;
    specialists and router from the client's own generator. A smaller rank gets the first rows of a
    larger one.
    """
    tensors = {}
    for slot, shape in shapes.items():
        if slot.matrix == "B" or slot.role == "merged":
            tensors[slot] = torch.zeros(shape)
            continue
        owner = client if slot.role in ("specialist", "router") else "all clients"
        random = generator(seed, "start", owner, str(slot))
        bound = 1 / math.sqrt(shape[1])
        draw = (
            random.normal(0, router_start, shape)
            if slot.role == "router"
            else random.uniform(-bound, bound, shape)
        )
        tensors[slot] = torch.from_numpy(draw.astype("float32"))
    return tensors
