"""The values training starts from: the same for all clients where a tensor is shared, a client's own where it is not."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from comigs.seeds import generator
from comigs.slots import Slot


def starting_tensors(shapes: Mapping[Slot, tuple[int, ...]], seed: int, client: str) -> dict[Slot, Tensor]:
    """A and router: Kaiming-uniform with a = sqrt(5), that is U(-1/sqrt(in), 1/sqrt(in)); B: zeros. float32, CPU.

    Generalists and attention are drawn from the run's seed alone, so all clients start alike; specialists and router
    from the client's own generator. A smaller rank gets the first rows of a larger one.
    """
    tensors = {}
    for slot, shape in shapes.items():
        if slot.matrix == "B":
            tensors[slot] = torch.zeros(shape)
            continue
        owner = client if slot.role in ("specialist", "router") else "all clients"
        bound = 1 / math.sqrt(shape[1])
        draw = generator(seed, "start", owner, str(slot)).uniform(-bound, bound, size=shape)
        tensors[slot] = torch.from_numpy(draw.astype("float32"))
    return tensors
