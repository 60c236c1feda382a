"""FLoRA: the server stacks the factors, which is the exact mean of the updates. 2409.05976.

Ranks may differ. Each client adds the stacked update to a frozen change of its base's linears and
starts its LoRA anew (A as drawn at the start, B zero). AdamW's moments are kept, as everywhere
here.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from comigs.config import Config
from comigs.methods import lowrank
from comigs.methods.merging import pairs, slots
from comigs.methods.method import Download, Memory, Method, RoundContext, Upload
from comigs.methods.shapes import one_expert, shares_all
from comigs.slots import Slot


def method(config: Config) -> Method:
    """Return the method with one expert per client, of the client's own rank."""

    def aggregate(
        uploads: Mapping[str, Upload], memory: Memory, context: RoundContext
    ) -> tuple[dict[str, Download], Memory]:
        factors = [pairs(upload) for upload in uploads.values()]
        update: dict[Slot, Tensor] = {}
        for place in factors[0] if factors else ():
            own = [f[place] for f in factors]
            weights = [config.experts.scale(len(A)) / len(factors) for A, _ in own]
            like = next(iter(uploads.values()))[Slot(*place, "A")]
            update |= slots((*place[:2], "update"), lowrank.stack(own, weights), like)
        return dict.fromkeys(context.clients, update), memory

    # What is merged has all that was learnt, so that LoRA can start anew at its own rank.
    return Method(
        name="flora",
        summary="ranks may differ: factors stacked (the exact mean), "
        "merged into the clients' frozen weights",
        paper="2409.05976",
        shares=shares_all,
        receives=lambda slot: slot.role == "update",
        aggregate=aggregate,
        shape=one_expert("generalist"),
        mixing="uniform",
        merges=True,
        reinitializes=True,
    )
