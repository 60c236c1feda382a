"""FedSA-LoRA: A is averaged, B stays home. 2410.01463."""

from comigs.config import Config
from comigs.methods.merging import mean_of_uploads
from comigs.methods.method import Method
from comigs.methods.shapes import one_expert, require_equal, shares_all
from comigs.slots import Slot


def method(config: Config) -> Method:
    """Return the method with one expert, both factors trained, A shared."""
    shape = one_expert("generalist")
    require_equal(config, "rank", "fedsa-lora averages A entry by entry", shape)

    def shares(slot: Slot) -> bool:
        return shares_all(slot) and slot.matrix == "A"

    # B has what differs between clients, A what their texts have in common.
    return Method(
        name="fedsa-lora",
        summary="one expert, A averaged, B stays home",
        paper="2410.01463",
        shares=shares,
        receives=shares,
        aggregate=mean_of_uploads,
        shape=shape,
        mixing="uniform",
        averages=True,
        leaks="",
    )
