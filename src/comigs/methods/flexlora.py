"""FlexLoRA: ranks differ; the server averages the products and gives each client their best factors
of its rank.

2402.11505, equations 3-5. The (out, in) product is never formed: the QR of the stacked factors
leaves a small SVD.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from comigs.config import Config
from comigs.methods import lowrank
from comigs.methods.method import (
    Download,
    Memory,
    Method,
    RoundContext,
    Upload,
    one_expert,
    pairs,
    shares_all,
    slots,
)
from comigs.slots import Slot


def method(config: Config) -> Method:
    """One expert per client, of the client's own rank."""
    shape, scale = one_expert("generalist"), config.experts.scale
    shapes = {client.name: shape(config.shape_of(client)) for client in config.clients}

    def aggregate(
        uploads: Mapping[str, Upload], memory: Memory, context: RoundContext
    ) -> tuple[dict[str, Download], Memory]:
        factors = {name: pairs(upload) for name, upload in uploads.items()}
        total = sum(context.weights[name] for name in uploads)
        downloads: dict[str, Download] = {}
        merged: dict[int, dict[Slot, Tensor]] = {}  # by the client's rank
        for client in context.clients:
            rank = shapes[client].rank
            if rank not in merged:
                merged[rank] = {}
                for at, (A, _) in next(iter(factors.values()), {}).items():
                    wanted = rank if at[2] != "attention" else A.shape[0]
                    weights = [
                        context.weights[n] / total * scale(f[at][0].shape[0]) / scale(wanted)
                        for n, f in factors.items()
                    ]
                    pair = lowrank.factorize(
                        lowrank.stack([f[at] for f in factors.values()], weights), wanted
                    )
                    merged[rank] |= slots(
                        at, pair, next(iter(next(iter(uploads.values())).values()))
                    )
            downloads[client] = merged[rank]
        return downloads, memory

    return Method(
        name="flexlora",
        summary="ranks may differ: products averaged, each client gets their best factors of its rank (SVD)",
        paper="2402.11505",
        weights="tokens in train, or clients.NAME.weight",
        shares=shares_all,
        receives=shares_all,
        aggregate=aggregate,
        shape=shape,
        mixing="uniform",
    )
