"""FFA-LoRA: A stays as it was drawn, equal on all clients; B is trained and averaged. 2403.12313.

The mean of B is then exactly the mean of the updates. Half as many scalars are trained as
elsewhere.
"""

from comigs.config import Config
from comigs.methods.merging import mean_of_uploads
from comigs.methods.method import Method
from comigs.methods.shapes import one_expert, require_equal, shares_all


def method(config: Config) -> Method:
    """Return the method with one expert whose B alone is trained."""
    shape = one_expert("generalist")
    require_equal(config, "rank", "ffa-lora averages B entry by entry", shape)
    return Method(
        name="ffa-lora",
        summary="one expert, A frozen at the common start, B averaged",
        paper="2403.12313",
        shares=shares_all,
        receives=lambda slot: shares_all(slot) and slot.matrix == "B",
        trains=lambda slot, round: slot.matrix == "B",
        aggregate=mean_of_uploads,
        shape=shape,
        mixing="uniform",
        averages=True,
        leaks="",
    )
