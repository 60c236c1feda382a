"""RoLoRA: rounds alternate between training and averaging B only and A only. 2502.01755.

The factor that rests is equal on all clients, so each merge is exactly the mean of the updates.
"""

from comigs.config import Config
from comigs.methods.method import Method, mean_of_uploads, one_expert, require_equal, shares_all
from comigs.slots import Slot


def method(config: Config) -> Method:
    """One expert; B in odd rounds (B starts at zero, so A alone would learn nothing), A in even
    ones.
    """
    shape = one_expert("generalist")
    require_equal(config, "rank", "rolora averages A and B entry by entry", shape)

    def trains(slot: Slot, round: int) -> bool:
        return slot.matrix == ("B" if round % 2 else "A")

    return Method(
        name="rolora",
        summary="one expert; rounds alternate: B trained and averaged, then A",
        paper="2502.01755",
        shares=shares_all,
        receives=shares_all,
        trains=trains,
        aggregate=mean_of_uploads,
        shape=shape,
        mixing="uniform",
        averages=True,
    )
