"""Every client alone: every expert is a specialist, mixed uniformly, and nothing is shared."""

from comigs.config import Config, ExpertShape
from comigs.methods.method import Method, mean_of_uploads
from comigs.slots import Slot


def method(config: Config) -> Method:
    """No exchange at all: uploads and downloads are empty."""

    def shares(slot: Slot) -> bool:
        return False

    def all_specialists(shape: ExpertShape) -> ExpertShape:
        return shape.model_copy(update={"generalists": 0, "specialists": shape.num_experts})

    return Method(
        name="local",
        summary="nothing is shared, experts mixed uniformly",
        paper="-",
        shares=shares,
        receives=shares,
        aggregate=mean_of_uploads,
        shape=all_specialists,
        routed=False,
    )
