"""Every client alone: every expert is a specialist, mixed uniformly, and nothing is shared."""

from comigs.config import Config, ExpertShape
from comigs.methods.method import Method, mean_of_uploads, one_expert
from comigs.slots import Slot


def method(config: Config) -> Method:
    """No exchange at all: uploads and downloads are empty."""

    def shares(slot: Slot) -> bool:
        return False

    def all_specialists(shape: ExpertShape) -> ExpertShape:
        if shape.generalists and shape.specialist_rank != shape.rank:
            return one_expert("specialist")(shape)
        return shape.model_copy(update={"generalists": 0, "specialists": shape.num_experts})

    return Method(
        name="local",
        summary="nothing is shared, experts mixed uniformly",
        paper="-",
        shares=shares,
        receives=shares,
        aggregate=mean_of_uploads,
        weights="-",
        shape=all_specialists,
        mixing="uniform",
        averages=True,
    )
