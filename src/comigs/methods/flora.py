"""FLoRA: ranks may differ; the server stacks the factors, which is the exact mean of the updates.
2409.05976.

Each client adds the stacked update to a frozen change of its base's linears and starts its LoRA
anew (A as drawn at the start, B zero). AdamW's moments are kept, as everywhere here.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from comigs.config import Config
from comigs.methods import lowrank
from comigs.methods.method import (
    Download,
    Memory,
    Method,
    RoundContext,
    Upload,
    one_expert,
    pairs,
    shares_all,
    slots,
)
from comigs.slots import Slot


def method(config: Config) -> Method:
    """One expert per client, of the client's own rank."""

    def aggregate(
        uploads: Mapping[str, Upload], memory: Memory, context: RoundContext
    ) -> tuple[dict[str, Download], Memory]:
        factors = [pairs(upload) for upload in uploads.values()]
        update: dict[Slot, Tensor] = {}
        for at in factors[0] if factors else ():
            weights = [config.experts.scale(len(f[at][0])) / len(factors) for f in factors]
            like = next(iter(uploads.values()))[Slot(*at, "A")]
            update |= slots(
                (*at[:2], "update"), lowrank.stack([f[at] for f in factors], weights), like
            )
        return dict.fromkeys(context.clients, update), memory

    return Method(
        name="flora",
        summary="ranks may differ: factors stacked (the exact mean), merged into the clients' frozen weights",
        paper="2409.05976",
        shares=shares_all,
        receives=lambda slot: slot.role == "update",
        aggregate=aggregate,
        shape=one_expert("generalist"),
        mixing="uniform",
        merges=True,
        reinitializes=True,
    )
