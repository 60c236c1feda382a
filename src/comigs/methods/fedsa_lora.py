"""FedSA-LoRA: A is averaged, B stays home. 2410.01463."""

from comigs.config import Config
from comigs.methods.method import Method, mean_of_uploads, one_expert, require_equal, shares_all
from comigs.slots import Slot


def method(config: Config) -> Method:
    """One expert, both factors trained, A shared."""
    shape = one_expert("generalist")
    require_equal(config, "rank", "fedsa-lora averages A entry by entry", shape)

    def shares(slot: Slot) -> bool:
        return shares_all(slot) and slot.matrix == "A"

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
    )
