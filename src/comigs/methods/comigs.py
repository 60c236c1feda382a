"""CoMiGS: generalists averaged over all clients, specialists and router at home, the router taught by valid.

2409.13931. Its variants are numbers: 1g1s, 2g (`generalists = 2, specialists = 0`), 2s (`generalists = 0,
specialists = 2, share_attention = false`), 1gXs (`specialists` differs between clients).

Two things are ours (docs/decisions/0007): the server keeps the length of the clients' steps, which a plain mean
shortens where they differ, and a client goes only as far towards a download as its valid asks. Both are options;
`configs/paper.toml` has neither. Three more are on trial (LOG.md): the last download kept as frozen experts beside the
client's own, as in FedALT (2503.11880), which get the more weight the less of the download was adopted; a router that
learns in every local step, too; own experts that are a single one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field

from comigs.config import Config, ExpertShape, Section
from comigs.errors import UserError
from comigs.methods.method import (
    Download,
    Facts,
    Memory,
    Method,
    Tensors,
    Upload,
    mean_of_uploads,
    one_expert,
    options,
    require_equal,
)  # fmt: skip
from comigs.slots import Slot


class Options(Section):
    """[options] of comigs."""

    server_step: Literal["mean", "full"] = Field(
        "full", description='"mean": the mean of uploads; "full": a step that way, as long as the clients\' own'
    )
    adopt: Literal["all", "valid"] = Field(
        "valid", description='"all" of a download, or as far towards it as "valid" asks'
    )
    rest: Literal["none", "frozen"] = Field(
        "none",
        description='"frozen": what adopt leaves of a download works beside the client\'s own experts, untrained',
    )
    own: Literal["configured", "one"] = Field(
        "configured", description='the client\'s own experts: as [experts] says, or "one" generalist of all their ranks'
    )
    router: Literal["valid", "both"] = Field(
        "valid", description='what it learns from: "valid" in its phases; "both": with the experts on train as well'
    )
    probe_windows: int = Field(16, ge=1, description="windows of valid on which adopt decides, drawn anew each round")


def method(config: Config) -> Method:
    """The paper's method, with our server step and adoption where the options say so."""
    settings = options(config, Options)
    if settings.rest == "frozen" and settings.adopt != "valid":
        raise UserError(f'options.rest: "frozen" needs options.adopt "valid", given "{settings.adopt}"')
    shape = one_expert("generalist") if settings.own == "one" else as_configured
    chosen = replace(
        as_published(config, shape),
        aggregate=full_step if settings.server_step == "full" else mean_of_uploads,
        adopt=adopt_as_valid_asks if settings.adopt == "valid" else None,
        schedule="both" if settings.router == "both" else "alternating",
        probe=settings.probe_windows,
        shape=shape,
    )
    if settings.rest == "none":
        return chosen
    return beside_the_rest(chosen, shape(config.shape_of(config.clients[0])).generalists)


def as_configured(shape: ExpertShape) -> ExpertShape:
    """The experts that [experts] and [[clients]] name."""
    return shape


def as_published(config: Config, shape: Callable[[ExpertShape], ExpertShape] = as_configured) -> Method:
    """The server's mean over generalists and, unless `experts.share_attention` is false, attention LoRA."""
    advice = f"{config.method} averages generalists entry by entry. Set specialist_rank, which may differ"
    if shape is not as_configured:
        advice = f'{config.method} averages generalists entry by entry, and options.own = "one" makes one of all ranks'
    require_equal(config, "rank", advice, shape)
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


def beside_the_rest(method: Method, generalists: int) -> Method:
    """The same with the last download's generalists as frozen experts after a client's own: g1 is g0's, of one.

    Where valid asks for all of a download, nothing of it is left to put beside the client's own; where valid asks for
    none, the router chooses between all. In between, the weights are: the router is as far open to the rest as the
    download was not adopted. Until the first download it is closed.
    """

    def is_own(slot: Slot) -> bool:
        return slot.role != "generalist" or int(slot.part[1:]) < generalists

    def adopt(own: Tensors, download: Download, nats: Callable[[Tensors], float]) -> Tensors:
        share = share_that_valid_asks(own, download, nats)
        rest = {
            replace(slot, part=f"g{generalists + int(slot.part[1:])}"): tensor
            for slot, tensor in download.items()
            if slot.role == "generalist"
        }
        gates = {s: torch.full_like(tensor, 1 - share) for s, tensor in own.items() if is_gate(s)}
        return {**towards(own, download, share), **rest, **gates}

    return replace(
        method,
        shares=lambda slot: method.shares(slot) and is_own(slot),
        receives=lambda slot: method.receives(slot) and is_own(slot),
        trains=lambda slot, round: is_own(slot) and not is_gate(slot),
        shape=lambda shape: (own := method.shape(shape)).model_copy(update={"generalists": 2 * own.generalists}),
        adopt=adopt,
        rest=True,
    )


def is_gate(slot: Slot) -> bool:
    """How far a router is open to the rest of the world."""
    return slot.role == "router" and slot.matrix == "B"


def full_step(uploads: Mapping[str, Upload], memory: Memory, facts: Facts) -> tuple[dict[str, Download], Memory]:
    """From the last download a step along the mean update, as long as the clients' own updates are on average.

    download = last + (mean_k |d_k| / |d|) d, with d_k = upload_k - last and d = mean_k d_k. The factor is 1 where all
    updates agree and sqrt(n) where n clients' updates are orthogonal, and no more where they oppose each other. The
    first round, which has no last download, takes the mean. Where `upload.merge` is no mean, it stands for both means.
    """
    average = facts.mean(uploads.values())
    if average and all(f"last/{slot}" in memory for slot in average):
        last = {slot: memory[f"last/{slot}"].to(torch.float64) for slot in average}
        lengths = [_length({slot: u[slot] - last[slot] for slot in average}) for u in uploads.values()]
        update = {slot: tensor - last[slot] for slot, tensor in average.items()}
        if (length := _length(update)) > 0:
            usual = facts.mean({"": torch.tensor(each, dtype=torch.float64)} for each in sorted(lengths))[""]
            factor = min(float(usual) / length, math.sqrt(len(lengths)))
            average = {slot: (last[slot] + factor * step).to(average[slot]) for slot, step in update.items()}
    return dict.fromkeys(facts.clients, average), dict(memory) | {f"last/{slot}": t for slot, t in average.items()}


def adopt_as_valid_asks(own: Tensors, download: Download, nats: Callable[[Tensors], float]) -> Tensors:
    """A download as far as it helps: a client whose text has little in common with the others' keeps what it learnt."""
    return towards(own, download, share_that_valid_asks(own, download, nats))


def towards(own: Tensors, download: Download, share: float) -> Tensors:
    """own + share * (download - own)."""
    return {slot: torch.lerp(own[slot], tensor, share) for slot, tensor in download.items()}


def share_that_valid_asks(own: Tensors, download: Download, nats: Callable[[Tensors], float]) -> float:
    """The best share of 0, 1/2, 1 and the lowest point of a parabola through them.

    The mixing of 2003.13461 (APFL), chosen anew each round, on valid.
    """
    nats_at = {share: nats(towards(own, download, share)) for share in (0.0, 0.5, 1.0)}
    bend = nats_at[0.0] - 2 * nats_at[0.5] + nats_at[1.0]
    if bend > 0:
        lowest = min(1.0, max(0.0, 0.5 + (nats_at[0.0] - nats_at[1.0]) / (4 * bend)))
        if lowest not in nats_at:  # measured as well, for a parabola may be wrong
            nats_at[lowest] = nats(towards(own, download, lowest))
    return min(nats_at, key=lambda share: nats_at[share])


def _length(tensors: Tensors) -> float:
    return math.sqrt(sum(float(t.to(torch.float64).square().sum()) for t in tensors.values()))
