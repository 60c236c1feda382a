"""FedAvg on all LoRA: every expert a generalist, mixed uniformly without a router. 1602.05629."""

from comigs.config import Config, ExpertShape
from comigs.methods.merging import mean_of_uploads
from comigs.methods.method import Method
from comigs.methods.shapes import one_expert, require_equal, shares_all


def method(config: Config) -> Method:
    """Return the method that averages every expert and attention LoRA."""
    for field in ("rank", "num_experts"):
        why = f"{config.method} averages experts entry by entry"
        require_equal(config, field, why, all_generalists)
    return Method(
        name="fedavg",
        summary="every expert and attention LoRA averaged, mixed uniformly",
        paper="1602.05629",
        shares=shares_all,
        receives=shares_all,
        aggregate=mean_of_uploads,
        shape=all_generalists,
        mixing="uniform",
        averages=True,
        leaks="",
    )


def all_generalists(shape: ExpertShape) -> ExpertShape:
    """Make all experts generalists, or one of all their ranks where ranks differ."""
    if shape.specialists and shape.specialist_rank != shape.rank:
        return one_expert("generalist")(shape)
    return shape.model_copy(update={"generalists": shape.num_experts, "specialists": 0})
