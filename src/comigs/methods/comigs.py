"""CoMiGS: generalists averaged over all clients, specialists and router at home, the router taught by valid.

2409.13931. Its variants are numbers: 1g1s, 2g (`generalists = 2, specialists = 0`), 2s (`generalists = 0,
specialists = 2, share_attention = false`), 1gXs (`specialists` differs between clients).
"""

from comigs.config import Config
from comigs.methods.method import Method, mean_of_uploads, require_equal
from comigs.slots import Slot


def method(config: Config) -> Method:
    """The server's mean over generalists and, unless `experts.share_attention` is false, attention LoRA."""
    require_equal(
        config, "rank", f"{config.method} averages generalists entry by entry. Set specialist_rank, which may differ"
    )
    shared = {"generalist", "attention"} if config.experts.share_attention else {"generalist"}

    def shares(slot: Slot) -> bool:
        return slot.role in shared

    return Method(
        name="comigs",
        summary="generalists averaged, specialists and router at home, router taught by valid (bi-level)",
        paper="2409.13931",
        shares=shares,
        receives=shares,
        aggregate=mean_of_uploads,
    )
