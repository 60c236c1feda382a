"""CoMiGS: generalists averaged over all clients, specialists and router at home. 2409.13931.

The router is taught by valid (bi-level). Variants are numbers: 1g1s, 2g (`generalists = 2,
specialists = 0`, apart), 2s (`generalists = 0, specialists = 2, share_attention = false`), 1gXs
(`specialists` differs between clients).

Four things are ours: a client's generalists go only as far towards a download as its valid asks
(docs/decisions/0007), its specialist is on top of them, beside everybody's (0030), attention LoRA
goes a full step (0024), and at the end valid chooses (0020). `configs/paper.toml` does without.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field

from comigs.config import Config, Section
from comigs.errors import UserError
from comigs.methods.alone import best_on_valid, most_candidates
from comigs.methods.full_step import mean_with_full_attention
from comigs.methods.loading import options
from comigs.methods.merging import mean_of_uploads
from comigs.methods.method import Download, Method, Mixed, Nats, Tensors
from comigs.methods.shapes import Shape, as_configured, on_top, others_of, require_equal
from comigs.slots import OTHERS, Slot

Attention = Literal["whole", "as-asked"]  # how much of attention LoRA is taken of a download
SHARES = (1.0, 0.5, 0.0)  # of a download that are measured on valid
LOOKS = 4  # at valid: these, and the lowest point of a parabola through them


class Adoption(Section):
    """The [options] of methods whose clients adopt as much of a download as valid asks."""

    probe_windows: int = Field(
        16,
        ge=1,
        description="A client decides how much it adopts on this many windows of valid, drawn anew "
        "each round.",
    )


class Options(Adoption):
    """The [options] of comigs."""

    adopt: Literal["all", "valid"] = Field(
        "valid",
        description='A client adopts "all" of a download, or generalists as far as "valid" asks.',
    )
    attention: Literal["full-step", "mean"] = Field(
        "full-step",
        description='The server goes a "full-step" in the direction of the mean of attention LoRA, '
        'as long as clients\' own are on average; or it sends the "mean", which is all that it '
        "can where it must not see uploads.",
    )
    specialists: Literal["on-top", "apart"] = Field(
        "on-top",
        description='A specialist is "on-top" of the generalists: together they are one expert of '
        "the client's own, which the router weighs against the generalists that everybody gets. "
        'Or it is an expert "apart", as in the paper.',
    )
    finish: Literal["mixture", "valid"] = Field(
        "valid",
        description='At the end a client keeps its "mixture", or whatever its "valid" says is best '
        "of that, each expert alone, attention LoRA alone, and the base.",
    )


def method(config: Config) -> Method:
    """Return the paper's method, with adoption and a choice at the end where the options say so."""
    settings = options(config, Options)
    apart = settings.specialists == "apart"
    method = as_published(config) if apart else beside_the_mean(config, settings)
    if settings.attention == "full-step":
        method = replace(method, aggregate=mean_with_full_attention, averages=False)
    if settings.adopt == "valid":
        mix = method.mix or mix_as_valid_asks
        # What has noise is not put beside a client's own either, nor is its attention LoRA taken.
        if config.privacy.by_document:
            mix = mix_what_has_noise
        method = replace(method, mix=mix, looks=LOOKS, probe=settings.probe_windows)
    if settings.finish == "valid":
        shapes = [method.shape(config.shape_of(client)) for client in config.clients]
        most = max(len(shape.parts) for shape in shapes)
        method = replace(method, finish=best_on_valid, last_looks=most_candidates(most))
    return method


def as_published(
    config: Config,
    shape: Shape = as_configured,
    advice: str = "Set specialist_rank, which may differ",
) -> Method:
    """Return the method that averages generalists and, with share_attention, attention LoRA."""
    why = f"{config.method} averages generalists entry by entry. {advice}"
    require_equal(config, "rank", why, shape)
    # Specialists and router are never shared, whatever the settings say.
    shared = {"generalist", "attention"} if config.experts.share_attention else {"generalist"}

    def shares(slot: Slot) -> bool:
        return slot.role in shared

    return Method(
        name="comigs",
        summary="generalists averaged, specialists and router at home, "
        "router taught by valid (bi-level)",
        paper="2409.13931",
        shares=shares,
        receives=shares,
        aggregate=mean_of_uploads,
        averages=True,
        leaks="",
    )


def beside_the_mean(config: Config, settings: Options) -> Method:
    """Return the method whose specialists are on top of the generalists.

    The router learns with the experts from train, too. Raises UserError where a download is taken
    whole.
    """
    method = as_published(config, on_top)
    if config.experts.generalists == 0:
        note = (
            "experts.generalists is 0, so there is nothing to be on top of: specialists are apart"
        )
        return replace(method, note=note)
    if settings.adopt != "valid":
        raise UserError(
            f'options.adopt: given "{settings.adopt}" beside options.specialists = "on-top", where '
            'nothing of a client\'s own would outlive a download; must be "valid"'
        )
    # The router weighs what a client knows against what all know, of which train tells, too.
    return replace(
        method,
        summary="generalists averaged, with specialists on top at home, "
        "where a router weighs own against everybody's (bi-level)",
        shape=on_top,
        on_top=True,
        schedule="both",
        mix=mix_beside_others,
    )


def mix_as_valid_asks(own: Tensors, download: Download, nats: Nats) -> Mixed:
    """Mix a download in as far as it helps, and return what is written and how far that is.

    A client whose text has little in common with the others' keeps what it learnt.
    """
    share = share_that_valid_asks(own, download, nats)
    return towards(own, download, share), share


def mix_what_has_noise(own: Tensors, download: Download, nats: Nats) -> Mixed:
    """Take all of a private download, half of it or none, attention LoRA as well (0022).

    A client to which noise is of no use stays as it would be by itself. A few hundredths of noise
    often look better than none on a few windows, and are worse in the end.
    """
    nats_at = {}
    for share in SHARES:
        nats_at[share] = nats(towards(own, download, share, "as-asked"))
    share = min(nats_at, key=lambda share: nats_at[share])
    return towards(own, download, share, "as-asked"), share


def mix_beside_others(own: Tensors, download: Download, nats: Nats) -> Mixed:
    """Mix a download in as far as valid asks, and leave the rest of it to the router.

    Where valid asks for all of a download, nothing of it is left to put beside the client's own;
    where valid asks for none, the router chooses between both. In between, the weights are: the
    router's gate is as far open to the others as the download was not adopted. Until the first
    download it is closed. A download that is what the client sent asks for nothing.
    """
    generalists = {slot: t for slot, t in download.items() if slot.role == "generalist"}
    share, open, written = 0.0, 0.0, dict(download)
    if not all(torch.equal(own[slot], tensor) for slot, tensor in generalists.items()):
        share = share_that_valid_asks(own, download, nats)
        open, written = 1 - share, towards(own, download, share)
    written |= others_of(download)
    for slot, tensor in own.items():
        if slot.is_gate:
            written[slot] = torch.full_like(tensor, open)
    return written, share


def towards(
    own: Tensors, download: Download, share: float, attention: Attention = "whole"
) -> dict[Slot, torch.Tensor]:
    """Return own + share * (download - own) of the generalists.

    Attention LoRA is one for all, and taken whole (0007), but for what has noise (0022). A
    specialist on top of generalists goes towards zero, for a download has none: where all of it is
    taken, that starts anew (0030).
    """
    mixed = {}
    for slot, tensor in download.items():
        whole = slot.role == "attention" and attention == "whole"
        mixed[slot] = tensor if whole else torch.lerp(own[slot], tensor, share)
    is_on_top = any(slot.role == OTHERS for slot in own)
    for slot, tensor in own.items():
        if is_on_top and slot.role == "specialist" and slot.matrix == "B":
            mixed[slot] = (1 - share) * tensor
    return mixed


def share_that_valid_asks(own: Tensors, download: Download, nats: Nats) -> float:
    """Return the best share of 1, 1/2, 0 and the lowest point of a parabola through them.

    Of equally good ones it is the first. This is the mixing of 2003.13461 (APFL), chosen anew each
    round, on valid.
    """
    nats_at = {share: nats(towards(own, download, share)) for share in SHARES}
    bend = nats_at[0.0] - 2 * nats_at[0.5] + nats_at[1.0]
    if bend > 0:
        lowest = min(1.0, max(0.0, 0.5 + (nats_at[0.0] - nats_at[1.0]) / (4 * bend)))
        # It is measured as well, for a parabola may be wrong.
        if lowest not in nats_at:
            nats_at[lowest] = nats(towards(own, download, lowest))
    return min(nats_at, key=lambda share: nats_at[share])
