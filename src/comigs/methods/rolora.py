"""RoLoRA: rounds alternate between training and averaging B only and A only. 2502.01755.

The factor that rests is equal on all clients, so each merge is exactly the mean of the updates.
"""

from comigs.config import Config
from comigs.methods.merging import mean_of_uploads
from comigs.methods.method import Method
from comigs.methods.shapes import one_expert, require_equal, shares_all


def method(config: Config) -> Method:
    """Return the method with one expert: B in odd rounds, A in even ones.

    B starts at zero, so A alone would learn nothing.
    """
    shape = one_expert("generalist")
    require_equal(config, "rank", "rolora averages A and B entry by entry", shape)
    return Method(
        name="rolora",
        summary="one expert; rounds alternate: B trained and averaged, then A",
        paper="2502.01755",
        shares=shares_all,
        receives=shares_all,
        trains=lambda slot, round: slot.matrix == ("B" if round % 2 else "A"),
        aggregate=mean_of_uploads,
        shape=shape,
        mixing="uniform",
        averages=True,
        leaks="",
    )
