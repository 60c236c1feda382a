"""What a method costs before anything runs: scalars trained per client, bytes that travel per client and round."""

from __future__ import annotations

from dataclasses import dataclass

from comigs.bases.load import Base
from comigs.config import Config
from comigs.engines.rounds import traffic
from comigs.experts.attach import Attachment
from comigs.experts.start import starting_tensors
from comigs.methods.method import Facts, load_method


@dataclass(frozen=True)
class Budget:
    """trained_parameters: scalars the client trains, its router aside. router_parameters: of the router.

    uploaded_bytes, downloaded_bytes: per round, mean of two rounds (a method may alternate).
    """

    trained_parameters: int
    router_parameters: int
    uploaded_bytes: float
    downloaded_bytes: float


def budgets(config: Config, base: Base) -> dict[str, Budget]:
    """Each client's budget, by name. The server's merge is really done once for each kind of round."""
    method, names = load_method(config), [c.name for c in config.clients]
    with Attachment(base.model, base.architecture, config.experts) as attachment:
        tensors = {}
        for client in config.clients:
            shape = method.shape(config.shape_of(client))
            shapes = attachment.slot_shapes(shape, method.mixing == "routed", method.merges)
            tensors[client.name] = starting_tensors(shapes, config.seed, client.name)
    trainers = names[:1] if method.pooled else names
    facts = Facts(
        tuple(names), dict.fromkeys(names, 1), {r: dict.fromkeys(names, 1.0) for r in names if method.reads_peers}
    )
    sent = dict.fromkeys(names, 0)
    got = dict.fromkeys(names, 0)
    for round in (1, 2):
        uploads = {
            n: {s: t for s, t in tensors[n].items() if method.shares(s) and method.trains(s, round)} for n in trainers
        }
        downloads, _ = method.aggregate(uploads, {}, facts)
        for name in names:
            bytes_of = traffic(name, {name: {}, **uploads}, downloads, method.reads_peers)
            sent[name] += bytes_of["uploaded_bytes"]
            got[name] += bytes_of["downloaded_bytes"]
    return {
        name: Budget(
            trained_parameters=sum(
                t.numel()
                for slot, t in tensors[name].items()
                if slot.role not in ("router", "merged") and any(method.trains(slot, r) for r in (1, 2))
            ),
            router_parameters=sum(t.numel() for slot, t in tensors[name].items() if slot.role == "router"),
            uploaded_bytes=sent[name] / 2,
            downloaded_bytes=got[name] / 2,
        )
        for name in names
    }
