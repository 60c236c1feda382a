"""FedAvg on all LoRA: every expert is a generalist, mixed uniformly without a router.
1602.05629.
"""

from comigs.config import Config, ExpertShape
from comigs.methods.method import Method, mean_of_uploads, one_expert, require_equal, shares_all


def method(config: Config) -> Method:
    """The server's mean over every expert and attention LoRA."""
    for field in ("rank", "num_experts"):
        require_equal(
            config, field, f"{config.method} averages experts entry by entry", all_generalists
        )
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
    )


def all_generalists(shape: ExpertShape) -> ExpertShape:
    """As many experts as configured, all of them generalists; one of all their ranks together where
    ranks differ.
    """
    if shape.specialists and shape.specialist_rank != shape.rank:
        return one_expert("generalist")(shape)
    return shape.model_copy(update={"generalists": shape.num_experts, "specialists": 0})
