"""FedAvg on all LoRA: every expert is a generalist, mixed uniformly without a router. 1602.05629."""

from comigs.config import Config, ExpertShape
from comigs.methods.method import Method, mean_of_uploads, require_equal
from comigs.slots import Slot


def method(config: Config) -> Method:
    """The server's mean over every expert and attention LoRA."""
    for field in ("rank", "num_experts"):
        require_equal(config, field, "fedavg averages experts entry by entry")

    def shares(slot: Slot) -> bool:
        return slot.role in ("generalist", "attention")

    def all_generalists(shape: ExpertShape) -> ExpertShape:
        return shape.model_copy(update={"generalists": shape.num_experts, "specialists": 0})

    return Method(
        name="fedavg",
        summary="every expert and attention LoRA averaged, mixed uniformly",
        paper="1602.05629",
        shares=shares,
        receives=shares,
        aggregate=mean_of_uploads,
        shape=all_generalists,
        routed=False,
    )
