"""CoMiGS: generalists averaged over all clients, specialists and router at home, the router taught by valid.

2409.13931. Its variants are numbers: 1g1s, 2g (`generalists = 2, specialists = 0`), 2s (`generalists = 0,
specialists = 2, share_attention = false`), 1gXs (`specialists` differs between clients).
"""

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import torch
from pydantic import Field

from comigs.config import Config, Section
from comigs.methods.method import (
    Download, Facts, Memory, Method, Tensors, Upload, mean, options, require_equal,
)  # fmt: skip
from comigs.slots import Slot


class Options(Section):
    """[options] of comigs."""

    adopt: Literal["mean", "valid"] = Field(
        "mean", description='what a client makes of a download: "mean" takes it; "valid" goes as far towards it as valid asks'
    )
    server_lr: float = Field(1.0, gt=0, description="server's step along the (momentum of the) mean update; 1: the mean itself")
    server_momentum: float = Field(0.0, ge=0, lt=1, description="Nesterov momentum of the server's steps; 0: none")
    probe_windows: int = Field(16, ge=1, description="windows of valid on which that is decided, drawn anew each round")


def method(config: Config) -> Method:
    """The server's mean over generalists and, unless `experts.share_attention` is false, attention LoRA."""
    require_equal(
        config, "rank", f"{config.method} averages generalists entry by entry. Set specialist_rank, which may differ"
    )
    settings = options(config, Options)
    shared = {"generalist", "attention"} if config.experts.share_attention else {"generalist"}

    def shares(slot: Slot) -> bool:
        return slot.role in shared

    return Method(
        name="comigs",
        summary="generalists averaged, specialists and router at home, router taught by valid (bi-level)",
        paper="2409.13931",
        shares=shares,
        receives=shares,
        aggregate=partial(stepped_mean, lr=settings.server_lr, momentum=settings.server_momentum),
        adopt=adopt_as_valid_asks if settings.adopt == "valid" else None,
        probe=settings.probe_windows,
    )


def stepped_mean(
    uploads: Mapping[str, Upload], memory: Memory, facts: Facts, lr: float, momentum: float
) -> tuple[dict[str, Download], Memory]:
    """From the last download a Nesterov step along the mean update (2311.08105, algorithm 1, outer optimiser SGD).

    v = momentum * v + (mean - last), download = last + lr * (mean - last + momentum * v). The first round has no last
    download and takes the mean.
    """
    average = mean(uploads.values())
    if lr == 1 and momentum == 0:
        return dict.fromkeys(facts.clients, average), memory
    download, kept = {}, dict(memory)
    for slot, tensor in average.items():
        if (last := memory.get(f"last/{slot}")) is not None:
            update = tensor - last
            velocity = momentum * memory.get(f"velocity/{slot}", torch.zeros_like(update)) + update
            kept[f"velocity/{slot}"] = velocity
            tensor = last + lr * (update + momentum * velocity)
        download[slot] = kept[f"last/{slot}"] = tensor
    return dict.fromkeys(facts.clients, download), kept


def adopt_as_valid_asks(own: Tensors, download: Download, nats: Callable[[Tensors], float]) -> Tensors:
    """own + share * (download - own), the share in [0, 1] at the lowest point of a parabola through 0, 1/2 and 1."""

    def at(share: float) -> Tensors:
        return {slot: torch.lerp(own[slot], tensor, share) for slot, tensor in download.items()}

    ends = {share: nats(at(share)) for share in (0.0, 0.5, 1.0)}
    bend = ends[0.0] - 2 * ends[0.5] + ends[1.0]
    share = 0.5 + (ends[0.0] - ends[1.0]) / (4 * bend) if bend > 0 else min(ends, key=lambda s: ends[s])
    if os.environ.get("COMIGS_DEBUG"):
        print("adopt", share, ends, file=open(os.environ["COMIGS_DEBUG"], "a"))
    return at(min(1.0, max(0.0, share)))
