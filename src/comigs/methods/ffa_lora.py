"""FFA-LoRA: A stays as it was drawn, the same on all clients; only B is trained and averaged.
2403.12313.

The mean of B is then exactly the mean of the updates. Half as many scalars are trained as
elsewhere.
"""

from comigs.config import Config
from comigs.methods.method import Method, mean_of_uploads, one_expert, require_equal, shares_all
from comigs.slots import Slot


def method(config: Config) -> Method:
    """One expert, B only."""
    shape = one_expert("generalist")
    require_equal(config, "rank", "ffa-lora averages B entry by entry", shape)

    def trains(slot: Slot, round: int) -> bool:
        return slot.matrix == "B"

    return Method(
        name="ffa-lora",
        summary="one expert, A frozen at the common start, B averaged",
        paper="2403.12313",
        shares=shares_all,
        receives=lambda slot: shares_all(slot) and slot.matrix == "B",
        trains=trains,
        aggregate=mean_of_uploads,
        shape=shape,
        mixing="uniform",
        averages=True,
    )
