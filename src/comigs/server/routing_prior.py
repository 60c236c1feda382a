"""A routing prior is what similar clients make of their experts, for a client without valid.

Every client reports the mean routing weights of its round, whatever it learns from. A client whose
router learns from "prior" is told the mean of what those report that learn from valid, each
weighted by the cosine of its step and the client's own: clients whose steps point the same way have
text that is alike (1910.01991). Routers themselves stay where they are.

L blocks, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from comigs.config import Config
from comigs.methods.method import Download, Upload
from comigs.runs.metrics import Line, RoundEnd, Train
from comigs.server.protocol import Prior
from comigs.server.validation import Start, origin_of, shapes_of
from comigs.slots import Shapes, Slot

Step = Mapping[Slot, Tensor]  # an upload minus the download that it was trained from


def latest_priors(history: Sequence[Line]) -> dict[str, Prior]:
    """Return the newest prior of each client that has one."""
    priors: dict[str, Prior] = {}
    for line in history:
        if isinstance(line, RoundEnd) and line.prior is not None:
            for name, prior_LE in line.prior.items():
                priors[name] = tuple(tuple(weights_E) for weights_E in prior_LE)
    return priors


def priors_of_round(
    config: Config,
    shapes: Mapping[str, Shapes],
    uploads: Mapping[str, Upload],
    sent: Mapping[str, Download],
    start: Start,
    lines: Sequence[Line],
) -> dict[str, list[list[float]]] | None:
    """Return the prior of each client that asks for one, from what a round brought.

    None: nobody asks, or nothing came of a client and of one that it could be told of. sent: what
    the uploads were trained from. lines: of the round.
    """
    sources = {client.name: config.router_data_of(client) for client in config.clients}
    asking = [name for name in uploads if sources[name] == "prior"]
    if not asking:
        return None
    reported = _reported([line for line in lines if sources.get(_name(line)) == "valid"])

    # The steps of who asks are few; those of the others are looked at one after the other.
    own = {name: step_of(uploads[name], sent.get(name, {}), start) for name in asking}
    told: dict[str, list[tuple[float, Tensor]]] = {name: [] for name in asking}
    for guide, weights_LE in reported.items():
        if guide not in uploads:
            continue
        step = step_of(uploads[guide], sent.get(guide, {}), start)
        for name in asking:
            if weights_LE.shape == router_shape(shapes[name]):
                told[name].append((cosine(own[name], step), weights_LE))
    return {name: weighted_mean(parts) for name, parts in told.items() if parts} or None


def _name(line: Line) -> str:
    return line.client if isinstance(line, Train) else ""


def _reported(lines: Sequence[Line]) -> dict[str, Tensor]:
    """Return client -> its mean routing weights (L, E), where it said any that can be a mean."""
    reported = {}
    for line in lines:
        if not isinstance(line, Train) or line.expert_share_by_layer is None:
            continue
        # Whoever lies about its weights gets no more say than anybody: they are made to sum to 1.
        blocks = [
            torch.tensor(share_E, dtype=torch.float64).clamp(min=0)
            for share_E in line.expert_share_by_layer
        ]
        one_size = len({len(weights_E) for weights_E in blocks}) == 1
        if one_size and all(float(weights_E.sum()) > 0 for weights_E in blocks):
            weights_LE = torch.stack(blocks)
            reported[line.client] = weights_LE / weights_LE.sum(dim=1, keepdim=True)
    return reported


def router_shape(shapes: Shapes) -> tuple[int, int]:
    """Return L and E of a client's routers; 0 and 0 where it has none."""
    routers = [dims for slot, dims in shapes.items() if slot.role == "router" and not slot.is_gate]
    return (len(routers), routers[0][0]) if routers else (0, 0)


def step_of(upload: Upload, download: Download, start: Start) -> dict[Slot, Tensor]:
    """Return how an upload differs from its download, or from the common start where it had none.

    A tensor of another shape, as where ranks differ or factors are stacked, is left out.
    """
    step, origin = {}, origin_of(download, shapes_of(upload), start)
    for slot, tensor in upload.items():
        if origin[slot].shape == tensor.shape:
            step[slot] = tensor.double() - origin[slot].to(tensor.device)
    return step


def cosine(one: Step, other: Step) -> float:
    """Return the cosine of two steps over what both have in one shape, and 0 where that is nothing.

    A step that goes nowhere is like no other.
    """
    product = one_square = other_square = 0.0
    for slot in one.keys() & other.keys():
        if one[slot].shape == other[slot].shape:
            product += float((one[slot] * other[slot]).sum())
            one_square += float(one[slot].square().sum())
            other_square += float(other[slot].square().sum())
    length = math.sqrt(one_square * other_square)
    return product / length if length > 0 else 0.0


def weighted_mean(parts: Sequence[tuple[float, Tensor]]) -> list[list[float]]:
    """Return the mean of weights (L, E), each counted by its cosine where that is positive.

    Where none is, all count alike.
    """
    counts = [max(0.0, similarity) for similarity, _ in parts]
    if sum(counts) == 0:
        counts = [1.0] * len(parts)
    total = torch.stack([count * part for count, (_, part) in zip(counts, parts, strict=True)])
    # rounded, a weight of 1 may become a little more
    mean: list[list[float]] = (total.sum(dim=0) / sum(counts)).clamp(max=1).tolist()
    return mean
