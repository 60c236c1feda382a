"""HetLoRA: smaller ranks are padded with zeros, clients prune ranks they do not use. 2401.06432.

A client takes the first r_k rows of what the server has (the largest rank), and counts in the mean
by the norm of its update, ||B_k A_k||_F. Its loss carries lambda ||A[t:]|| ||B[:, t:]||, t =
floor(gamma r_k), the tail of its ranks; where training made that tail smaller than it was in the
download, the tail is pruned: zero from then on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from pydantic import Field
from torch import Tensor

from comigs.config import Config, Section
from comigs.methods import lowrank
from comigs.methods.loading import options
from comigs.methods.lowrank import Pair
from comigs.methods.merging import Place, pairs, slots
from comigs.methods.method import Download, Memory, Method, RoundContext, Tensors, Upload
from comigs.methods.shapes import one_expert, shares_all
from comigs.slots import Slot


class Options(Section):
    """The [options] of hetlora."""

    penalty: float = Field(
        0.01, ge=0, description="The tail's norms have this weight in the local loss (lambda)."
    )
    gamma: float = Field(
        0.99, gt=0, le=1, description="This share of a rank is not its tail. 1: no pruning."
    )


def method(config: Config) -> Method:
    """Return the method with one expert per client, of the client's own rank."""
    settings, scale = options(config, Options), config.experts.scale
    shape = one_expert("generalist")
    ranks = {client.name: shape(config.shape_of(client)).rank for client in config.clients}

    def aggregate(
        uploads: Mapping[str, Upload], memory: Memory, context: RoundContext
    ) -> tuple[dict[str, Download], Memory]:
        # LoRA's scale differs between ranks, so it is part of B here, and taken out again below.
        # The memory holds the ranks that a client had not pruned when it last sent something.
        factors: dict[str, dict[Place, Pair]] = {}
        memory = dict(memory)
        for name, upload in uploads.items():
            factors[name] = {at: (A, B * scale(len(A))) for at, (A, B) in pairs(upload).items()}
            for place, pair in factors[name].items():
                memory[_key(name, place)] = torch.tensor(used_rank(pair))

        averages, likes, used = {}, {}, {}
        for place in next(iter(factors.values()), {}):
            averages[place] = weighted_mean([own[place] for own in factors.values()])
            likes[place] = next(iter(uploads.values()))[Slot(*place, "A")]
            used[place] = used_rank(averages[place])

        downloads: dict[str, Download] = {}
        made: dict[tuple[tuple[int, int], ...], Download] = {}
        for client in context.clients:
            rank, kept = {}, {}
            for place, (A, _) in averages.items():
                rank[place] = len(A) if place[2] == "attention" else ranks[client]
                kept[place] = int(memory.get(_key(client, place), rank[place]))
            # A client may use ranks that nobody sent: zeros there would never learn again.
            if client not in factors and any(kept[place] > used[place] for place in averages):
                continue
            # Clients that have and keep the same ranks get one object.
            kind = tuple((rank[place], kept[place]) for place in averages)
            if kind not in made:
                download: dict[Slot, Tensor] = {}
                for place, pair in averages.items():
                    A, B = lowrank.pad(lowrank.first_rows(pair, kept[place]), rank[place])
                    download |= slots(place, (A, B / scale(len(A))), likes[place])
                made[kind] = download
            downloads[client] = made[kind]
        return downloads, memory

    prunes = settings.gamma < 1
    return Method(
        name="hetlora",
        summary="ranks may differ: padded with zeros, merged by the size of the update, "
        "ranks not needed pruned",
        paper="2401.06432",
        weights="norm of the client's update",
        shares=shares_all,
        receives=shares_all,
        aggregate=aggregate,
        shape=shape,
        mixing="uniform",
        penalty=partial(penalty, settings) if prunes and settings.penalty else None,
        after_training=partial(pruned, settings) if prunes else None,
    )


def _key(client: str, place: Place) -> str:
    layer, site, part = place
    return f"{client}/{layer}.{site}.{part}"


def penalty(settings: Options, tensors: Tensors, anchor: Tensors) -> Tensor:
    """Return lambda times the sum of the tails' norms, with gradient."""
    norms = []
    for slot_A, slot_B in loras(tensors):
        norms.append(tail_norm((tensors[slot_A], tensors[slot_B]), settings.gamma))
    return settings.penalty * torch.stack(norms).sum()


def pruned(settings: Options, tensors: Tensors, anchor: Tensors) -> Tensors:
    """Return the tensors with zeros where training made a tail smaller than it was."""
    after = dict(tensors)
    for slot_A, slot_B in loras(tensors):
        now, then = (tensors[slot_A], tensors[slot_B]), (anchor[slot_A], anchor[slot_B])
        if tail_norm(now, settings.gamma) < tail_norm(then, settings.gamma):
            head = lowrank.first_rows(now, tail_start(now, settings.gamma))
            after[slot_A], after[slot_B] = lowrank.pad(head, len(now[0]))
    return after


def loras(tensors: Tensors) -> list[tuple[Slot, Slot]]:
    """Return the slots of A and B of every LoRA."""
    return [(s, Slot(s.layer, s.site, s.part, "B")) for s in tensors if s.matrix == "A"]


def weighted_mean(factors: Sequence[Pair]) -> Pair:
    """Return the mean of pairs padded to the largest rank, weighted by their products' norms.

    Where all are zero, the weights are equal.
    """
    norms = [lowrank.product_norm(pair) for pair in factors]
    total = sum(norms)
    largest = max(len(A) for A, _ in factors)
    parts_A, parts_B = [], []
    for norm, pair in zip(norms, factors, strict=True):
        weight = norm / total if total > 0 else 1 / len(norms)
        A, B = lowrank.pad(pair, largest)
        parts_A.append(weight * A)
        parts_B.append(weight * B)
    return torch.stack(parts_A).sum(dim=0), torch.stack(parts_B).sum(dim=0)


def used_rank(pair: Pair) -> int:
    """Return the ranks before those that are pruned, which are zero in A and in B."""
    used = pair[0].any(dim=1) | pair[1].any(dim=0)
    return int(used.nonzero().max()) + 1 if bool(used.any()) else 0


def tail_start(pair: Pair, gamma: float) -> int:
    """Return t = floor(gamma r), r the ranks still used; at least one rank stays."""
    return max(1, int(gamma * used_rank(pair)))


def tail_norm(pair: Pair, gamma: float) -> Tensor:
    """Return ||A[t:]|| ||B[:, t:]||, a scalar with gradient."""
    t = tail_start(pair, gamma)
    norm: Tensor = torch.linalg.vector_norm(pair[0][t:]) * torch.linalg.vector_norm(pair[1][:, t:])
    return norm
