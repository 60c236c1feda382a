"""CoMiGS: generalists averaged over all clients, specialists and router at home, the router taught
by valid (bi-level).

2409.13931. Its variants are numbers: 1g1s, 2g (`generalists = 2, specialists = 0`), 2s
(`generalists = 0, specialists = 2, share_attention = false`), 1gXs (`specialists` differs between
clients).

Two things are ours. A client's generalists go only as far towards a download as its valid asks
(docs/decisions/0007).
And where the config does not say how many experts there are, a client has a single one of all their
ranks, which is averaged, and beside it what it did not adopt: the rest of the world, frozen (0013).
`configs/paper.toml` has neither.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field

from comigs.config import Config, ExpertShape, Section
from comigs.errors import UserError
from comigs.methods.method import (
    Download,
    Method,
    Mixed,
    Tensors,
    beside_others,
    mean_of_uploads,
    options,
    others_of,
    require_equal,
)
from comigs.slots import Slot


class Options(Section):
    """[options] of comigs."""

    adopt: Literal["all", "valid"] = Field(
        "valid", description='"all" of a download, or its generalists only as far as "valid" asks'
    )
    probe_windows: int = Field(
        16, ge=1, description="windows of valid on which adopt decides, drawn anew each round"
    )


def method(config: Config) -> Method:
    """The paper's method with adoption, and with the rest of the world unless the config says how
    many experts.
    """
    settings = options(config, Options)
    if not config.numbers_experts:
        if settings.adopt != "valid":
            raise UserError(
                f'options.adopt: given "{settings.adopt}", which leaves nothing of a download to put beside the own '
                'expert; give "valid", or say how many experts there are (experts.generalists, experts.specialists)'
            )
        return replace(with_others(config), probe=settings.probe_windows)
    if settings.adopt == "all":
        return as_published(config)
    return replace(as_published(config), mix=mix_as_valid_asks, probe=settings.probe_windows)


def as_published(
    config: Config,
    shape: Callable[[ExpertShape], ExpertShape] = lambda shape: shape,
    advice: str = "Set specialist_rank, which may differ",
) -> Method:
    """The server's mean over generalists and, unless `experts.share_attention` is false, attention
    LoRA.
    """
    require_equal(
        config, "rank", f"{config.method} averages generalists entry by entry. {advice}", shape
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
        averages=True,
    )


def with_others(config: Config) -> Method:
    """One own expert of all ranks, and beside it the last download's, frozen, as in FedALT
    (2503.11880).

    Where valid asks for all of a download, nothing of it is left to put beside the client's own;
    where valid asks for none, the router chooses between both. In between, the weights are: the
    router is as far open to the rest as the download was not adopted. Until the first download it
    is closed. It learns with the experts from train, and by itself from valid.
    """

    def mix(own: Tensors, download: Download, nats: Callable[[Tensors], float]) -> Mixed:
        share = share_that_valid_asks(own, download, nats)
        gates = {
            slot: torch.full_like(tensor, 1 - share) for slot, tensor in own.items() if slot.is_gate
        }
        return {**towards(own, download, share), **others_of(download), **gates}, share

    shape = beside_others("gated")
    return replace(
        as_published(config, shape, "Say how many specialists there are, which may differ"),
        summary="own experts averaged as far as valid asks, what is left of the others frozen beside them (bi-level)",
        shape=shape,
        schedule="both",
        mix=mix,
    )


def mix_as_valid_asks(own: Tensors, download: Download, nats: Callable[[Tensors], float]) -> Mixed:
    """A download as far as it helps: a client whose text has little in common with the others'
    keeps what it learnt.
    """
    share = share_that_valid_asks(own, download, nats)
    return towards(own, download, share), share


def towards(own: Tensors, download: Download, share: float) -> Tensors:
    """own + share * (download - own) of the generalists; attention LoRA is one for all, taken whole
    (0007).
    """
    return {
        s: t if s.role == "attention" else torch.lerp(own[s], t, share) for s, t in download.items()
    }


def share_that_valid_asks(
    own: Tensors, download: Download, nats: Callable[[Tensors], float]
) -> float:
    """The best share of 1, 1/2, 0 and the lowest point of a parabola through them; of equally good
    ones the first.

    The mixing of 2003.13461 (APFL), chosen anew each round, on valid.
    """
    nats_at = {share: nats(towards(own, download, share)) for share in (1.0, 0.5, 0.0)}
    bend = nats_at[0.0] - 2 * nats_at[0.5] + nats_at[1.0]
    if bend > 0:
        lowest = min(1.0, max(0.0, 0.5 + (nats_at[0.0] - nats_at[1.0]) / (4 * bend)))
        if lowest not in nats_at:  # measured as well, for a parabola may be wrong
            nats_at[lowest] = nats(towards(own, download, lowest))
    return min(nats_at, key=lambda share: nats_at[share])
