"""FedEx-LoRA: factors averaged, and what that misses added to the frozen weights. 2410.09432.

The residual, mean(B A) - mean(B) mean(A), is sent as factors: B_1..B_n and mean(B) side by side, of
rank (n + 1) R.
"""

from __future__ import annotations

from collections.abc import Mapping

from comigs.config import Config
from comigs.methods import lowrank
from comigs.methods.merging import mean, pairs, slots
from comigs.methods.method import Download, Memory, Method, RoundContext, Upload
from comigs.methods.shapes import one_expert, require_equal, shares_all
from comigs.slots import Slot


def method(config: Config) -> Method:
    """Return the method with one expert and an exact merge."""
    shape = one_expert("generalist")
    require_equal(config, "rank", "fedex-lora averages A and B entry by entry", shape)

    def aggregate(
        uploads: Mapping[str, Upload], memory: Memory, context: RoundContext
    ) -> tuple[dict[str, Download], Memory]:
        average, factors = mean(uploads.values()), [pairs(upload) for upload in uploads.values()]
        download = dict(average)
        for place, of_means in pairs(average).items():
            scale = config.experts.scale(len(of_means[0]))
            stacked = [*[f[place] for f in factors], of_means]
            weights = [*[scale / len(factors)] * len(factors), -scale]
            residual = lowrank.stack(stacked, weights)
            like = average[Slot(*place, "A")]
            download |= slots((*place[:2], "update"), residual, like)
        return dict.fromkeys(context.clients, download), memory

    # The residual goes into the frozen weights, so that clients train on from the mean factors.
    return Method(
        name="fedex-lora",
        summary="factors averaged, "
        "and the rest of the exact mean merged into the clients' frozen weights",
        paper="2410.09432",
        shares=shares_all,
        receives=lambda slot: shares_all(slot) or slot.role == "update",
        aggregate=aggregate,
        shape=shape,
        mixing="uniform",
        merges=True,
        leaks="",
    )
