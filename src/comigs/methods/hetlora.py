"""HetLoRA: ranks differ; smaller ones are padded with zeros, and clients prune ranks they do not
use. 2401.06432.

A client takes the first r_k rows of what the server has (the largest rank), and counts in the mean
by the norm of its update, ||B_k A_k||_F. Its loss carries lambda ||A[t:]|| ||B[:, t:]||, t =
floor(gamma r_k), the tail of its ranks; where training made that tail smaller than it was in the
download, the tail is pruned: zero from then on.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from comigs.config import Config, Section
from comigs.methods import lowrank
from comigs.methods.method import (
    Download,
    Memory,
    Method,
    RoundContext,
    Tensors,
    Upload,
    one_expert,
    options,
    pairs,
    shares_all,
    slots,
)
from comigs.slots import Slot

At = tuple[int, str, str]  # layer, site, part


class Options(Section):
    """[options] of hetlora."""

    penalty: float = Field(
        0.01, ge=0, description="lambda: weight of the tail's norms in the local loss"
    )
    gamma: float = Field(
        0.99, gt=0, le=1, description="share of a rank that is not its tail; 1: no pruning"
    )


def method(config: Config) -> Method:
    """One expert per client, of the client's own rank."""
    settings, shape = options(config, Options), one_expert("generalist")
    ranks = {client.name: shape(config.shape_of(client)).rank for client in config.clients}

    def aggregate(
        uploads: Mapping[str, Upload], memory: Memory, context: RoundContext
    ) -> tuple[dict[str, Download], Memory]:
        """memory: "CLIENT/LAYER.SITE.PART" -> the ranks that the client had not pruned when it last
        sent something.
        """
        factors = {name: rescaled(pairs(upload), up=True) for name, upload in uploads.items()}
        sent = {
            f"{c}/{at[0]}.{at[1]}.{at[2]}": torch.tensor(used_rank(f[at]))
            for c, f in factors.items()
            for at in f
        }
        memory = {**memory, **sent}
        averages = {
            at: weighted_mean([f[at] for f in factors.values()])
            for at in next(iter(factors.values()), {})
        }
        likes = {at: next(iter(uploads.values()))[Slot(*at, "A")] for at in averages}
        used = {at: used_rank(average) for at, average in averages.items()}
        downloads: dict[str, Download] = {}
        made: dict[
            tuple[tuple[int, int], ...], Download
        ] = {}  # by ranks, and those of them that are kept
        for client in context.clients:
            rank = {
                at: ranks[client] if at[2] != "attention" else len(A)
                for at, (A, _) in averages.items()
            }
            kept = {
                at: int(memory.get(f"{client}/{at[0]}.{at[1]}.{at[2]}", rank[at]))
                for at in averages
            }
            if client not in factors and any(kept[at] > used[at] for at in averages):
                continue  # it uses ranks that nobody sent: zeros there would never learn again
            kind = tuple((rank[at], kept[at]) for at in averages)
            if kind not in made:
                cut = {
                    at: lowrank.pad(lowrank.first_rows(averages[at], kept[at]), rank[at])
                    for at in averages
                }
                parts = (slots(at, pair, likes[at]) for at, pair in rescaled(cut, up=False).items())
                made[kind] = {slot: tensor for part in parts for slot, tensor in part.items()}
            downloads[client] = made[kind]
        return downloads, memory

    def rescaled(factors: Mapping[At, lowrank.Pair], up: bool) -> dict[At, lowrank.Pair]:
        """LoRA's scale, which differs between ranks, put into B on the way up and taken out again
        on the way down.
        """
        result = {}
        for at, (A, B) in factors.items():
            scale = config.experts.scale(len(A))
            result[at] = (A, B * scale if up else B / scale)
        return result

    def penalty(tensors: Tensors, anchor: Tensors) -> Tensor:
        return (
            settings.penalty
            * torch.stack([tail_norm(pair, settings.gamma) for pair in both(tensors)]).sum()
        )

    def after_training(tensors: Tensors, anchor: Tensors) -> Tensors:
        after = dict(tensors)
        for slot in (s for s in tensors if s.matrix == "A"):
            partner = Slot(slot.layer, slot.site, slot.part, "B")
            now, then = (tensors[slot], tensors[partner]), (anchor[slot], anchor[partner])
            if tail_norm(now, settings.gamma) < tail_norm(then, settings.gamma):
                t = tail_start(now, settings.gamma)
                after[slot], after[partner] = lowrank.pad(lowrank.first_rows(now, t), len(now[0]))
        return after

    prunes = settings.gamma < 1
    return Method(
        name="hetlora",
        summary="ranks may differ: padded with zeros, merged by the size of the update, ranks not needed pruned",
        paper="2401.06432",
        weights="norm of the client's update",
        shares=shares_all,
        receives=shares_all,
        aggregate=aggregate,
        shape=shape,
        mixing="uniform",
        penalty=penalty if prunes and settings.penalty else None,
        after_training=after_training if prunes else None,
    )


def both(tensors: Tensors) -> list[lowrank.Pair]:
    """(A, B) of every LoRA."""
    return [
        (t, tensors[Slot(s.layer, s.site, s.part, "B")])
        for s, t in tensors.items()
        if s.matrix == "A"
    ]


def weighted_mean(factors: list[lowrank.Pair]) -> lowrank.Pair:
    """Mean of pairs padded to the largest rank, weighted by their products' norms (equally where
    all are zero).
    """
    largest = max(len(A) for A, _ in factors)
    norms = [lowrank.product_norm(pair) for pair in factors]
    total = sum(norms)
    weights = [norm / total if total > 0 else 1 / len(norms) for norm in norms]
    padded = [lowrank.pad(pair, largest) for pair in factors]
    A = torch.stack([w * pair[0] for w, pair in zip(weights, padded, strict=True)]).sum(dim=0)
    B = torch.stack([w * pair[1] for w, pair in zip(weights, padded, strict=True)]).sum(dim=0)
    return A, B


def used_rank(pair: lowrank.Pair) -> int:
    """Ranks before those that are pruned: the last row of A or column of B that is not all zero,
    and those before.
    """
    used = pair[0].any(dim=1) | pair[1].any(dim=0)
    return int(used.nonzero().max()) + 1 if bool(used.any()) else 0


def tail_start(pair: lowrank.Pair, gamma: float) -> int:
    """t = floor(gamma r), r the ranks still used; at least one rank stays."""
    return max(1, int(gamma * used_rank(pair)))


def tail_norm(pair: lowrank.Pair, gamma: float) -> Tensor:
    """||A[t:]|| ||B[:, t:]||, a scalar with gradient."""
    t = tail_start(pair, gamma)
    norm: Tensor = torch.linalg.vector_norm(pair[0][t:]) * torch.linalg.vector_norm(pair[1][:, t:])
    return norm
