"""FlexLoRA: the server averages products, and factors them for each client's rank. 2402.11505.

Ranks may differ: each client gets the best factors of its rank (equations 3-5). The (out, in)
product is never formed: the QR of the stacked factors leaves a small SVD.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from comigs.config import Config
from comigs.methods import lowrank
from comigs.methods.merging import pairs, slots
from comigs.methods.method import Download, Memory, Method, RoundContext, Upload
from comigs.methods.shapes import one_expert, shares_all
from comigs.slots import Slot


def method(config: Config) -> Method:
    """Return the method with one expert per client, of the client's own rank."""
    shape, scale = one_expert("generalist"), config.experts.scale
    ranks = {client.name: shape(config.shape_of(client)).rank for client in config.clients}

    def aggregate(
        uploads: Mapping[str, Upload], memory: Memory, context: RoundContext
    ) -> tuple[dict[str, Download], Memory]:
        total = sum(context.weights[name] for name in uploads)
        factors = {name: pairs(upload) for name, upload in uploads.items()}
        merged: dict[int, dict[Slot, Tensor]] = {}
        # Clients of one rank get one object.
        for rank in {ranks[client] for client in context.clients}:
            merged[rank] = {}
            for place, (A, _) in next(iter(factors.values()), {}).items():
                wanted = len(A) if place[2] == "attention" else rank
                # LoRA's scale differs between ranks, so it is part of each product.
                weights = []
                for name, own in factors.items():
                    weight = context.weights[name] / total
                    weights.append(weight * scale(len(own[place][0])) / scale(wanted))
                stacked = lowrank.stack([own[place] for own in factors.values()], weights)
                like = next(iter(next(iter(uploads.values())).values()))
                merged[rank] |= slots(place, lowrank.factorize(stacked, wanted), like)
        return {client: merged[ranks[client]] for client in context.clients}, memory

    return Method(
        name="flexlora",
        summary="ranks may differ: products averaged, "
        "each client gets their best factors of its rank (SVD)",
        paper="2402.11505",
        weights="tokens in train, or clients.NAME.weight",
        shares=shares_all,
        receives=shares_all,
        aggregate=aggregate,
        shape=shape,
        mixing="uniform",
        weighs=True,
        leaks="its mean weighs clients by how much text they have",
    )
