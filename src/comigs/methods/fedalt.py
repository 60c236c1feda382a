"""FedALT: each client trains its own LoRA beside a frozen one, the mean of all others', mixed by a
router. 2503.11880.

g0 is a client's own LoRA: trained, sent, never overwritten. The rest of the world is received,
never trained. The router learns with g0 from train. Both have the rank of all configured experts
together, so that as much is trained as elsewhere. Attention LoRA is one for all, as in every method
here.
"""

from __future__ import annotations

from collections.abc import Mapping

from comigs.config import Config
from comigs.methods.method import (
    Download,
    Memory,
    Method,
    RoundContext,
    Upload,
    beside_others,
    one_expert,
    others_of,
    require_equal,
    shares_all,
)
from comigs.slots import OTHERS


def method(config: Config) -> Method:
    """Own LoRA and rest of the world."""
    require_equal(
        config, "rank", "fedalt averages the others' LoRA entry by entry", one_expert("generalist")
    )

    return Method(
        name="fedalt",
        summary="own LoRA trained beside a frozen mean of all others', a router on train mixes them",
        paper="2503.11880",
        weights="equal, without the client itself",
        shares=shares_all,
        receives=lambda slot: slot.role in (OTHERS, "attention"),
        aggregate=aggregate,
        shape=beside_others("open"),
        schedule="joint",
        averages=True,
    )


def aggregate(
    uploads: Mapping[str, Upload], memory: Memory, context: RoundContext
) -> tuple[dict[str, Download], Memory]:
    """The rest of client i is the mean of the others' g0; attention LoRA the mean of all."""
    attention = context.mean(
        {s: u[s] for s in u if s.role == "attention"} for u in uploads.values()
    )

    def download(client: str | None) -> Download:
        others = context.mean(
            {s: u[s] for s in u if s.role == "generalist"}
            for name, u in uploads.items()
            if name != client
        )
        return {**attention, **others_of(others)}

    downloads = dict.fromkeys(
        context.clients, download(None)
    )  # of those who sent nothing, everybody is another
    return downloads | {name: download(name) for name in context.clients if name in uploads}, memory
