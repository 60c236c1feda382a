"""Local: every client alone, every expert a specialist, mixed uniformly; nothing is shared."""

from comigs.config import Config, ExpertShape
from comigs.methods.merging import mean_of_uploads
from comigs.methods.method import Method
from comigs.methods.shapes import one_expert


def method(config: Config) -> Method:
    """Return the method without any exchange: uploads and downloads are empty."""
    return Method(
        name="local",
        summary="nothing is shared, experts mixed uniformly",
        paper="-",
        shares=lambda slot: False,
        receives=lambda slot: False,
        aggregate=mean_of_uploads,
        weights="-",
        shape=all_specialists,
        mixing="uniform",
        averages=True,
        leaks="it sends nothing, so there is nothing to bound",
    )


def all_specialists(shape: ExpertShape) -> ExpertShape:
    """Make all experts specialists, or one of all their ranks where ranks differ."""
    if shape.generalists and shape.specialist_rank != shape.rank:
        return one_expert("specialist")(shape)
    return shape.model_copy(update={"generalists": 0, "specialists": shape.num_experts})
