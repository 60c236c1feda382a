"""What a method costs before anything runs: scalars trained per client, bytes that travel per
client and round.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from comigs.bases.load import Base
from comigs.config import Config
from comigs.experts.attach import Attachment
from comigs.experts.init import starting_tensors
from comigs.methods.method import RoundContext, Upload, load_method
from comigs.server.communication import traffic_by_client
from comigs.server.validation import expected_upload, shapes_of_clients


@dataclass(frozen=True)
class Budget:
    """trained_parameters: scalars the client trains, its router aside. router_parameters: of the
    router.

    uploaded_bytes, downloaded_bytes: per round, mean of two rounds (a method may alternate).
    """

    trained_parameters: int
    router_parameters: int
    uploaded_bytes: float
    downloaded_bytes: float


def budgets(config: Config, base: Base) -> dict[str, Budget]:
    """Each client's budget, by name. The server's merge is really done once for each kind of
    round.
    """
    method, names = load_method(config), [c.name for c in config.clients]
    with Attachment(base.model, base.architecture, config.experts) as attachment:
        shapes = shapes_of_clients(config, method, attachment)
    trainers = names[:1] if method.centralized else names
    facts = RoundContext(
        tuple(names),
        dict.fromkeys(names, 1.0),
        {r: dict.fromkeys(names, 1.0) for r in names if method.reads_peers},
    )
    sent = dict.fromkeys(names, 0)
    got = dict.fromkeys(names, 0)
    for round in (1, 2):
        expected = {name: expected_upload(method, shapes[name], round) for name in trainers}
        uploads: dict[str, Upload] = {
            n: starting_tensors(slots, config.seed, n) for n, slots in expected.items()
        }
        downloads, _ = method.aggregate(uploads, {}, facts)
        everyone: dict[str, Upload] = {name: uploads.get(name, {}) for name in names}
        moved = traffic_by_client(everyone, downloads, config.upload.format, method.reads_peers)
        for name in names:
            sent[name] += moved[name].uploaded_bytes
            got[name] += moved[name].downloaded_bytes
    return {
        name: Budget(
            trained_parameters=sum(
                math.prod(dims)
                for slot, dims in shapes[name].items()
                if slot.role != "router"
                and not slot.is_frozen
                and any(method.trains(slot, r) for r in (1, 2))
            ),
            router_parameters=sum(
                math.prod(dims) for slot, dims in shapes[name].items() if slot.role == "router"
            ),
            uploaded_bytes=sent[name] / 2,
            downloaded_bytes=got[name] / 2,
        )
        for name in names
    }
