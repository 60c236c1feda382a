"""FedALT: each client trains its own LoRA beside a frozen one, the mean of all others'. 2503.11880.

g0 is a client's own LoRA: trained, sent, never overwritten. The others' expert is received, never
trained. The router that mixes them learns with g0 from train. Both have the rank of all configured
experts together, so that as much is trained as elsewhere. Attention LoRA is one for all, as in
every method here.
"""

from __future__ import annotations

from collections.abc import Mapping

from comigs.config import Config
from comigs.methods.method import Download, Memory, Method, RoundContext, Tensors, Upload
from comigs.methods.shapes import beside_others, one_expert, others_of, require_equal, shares_all
from comigs.slots import OTHERS


def method(config: Config) -> Method:
    """Return the method that puts the others' LoRA beside the own."""
    why = "fedalt averages the others' LoRA entry by entry"
    require_equal(config, "rank", why, one_expert("generalist"))

    # One level: the router has no data of its own, and learns from train like the experts.
    return Method(
        name="fedalt",
        summary="own LoRA trained beside a frozen mean of all others', "
        "a router on train mixes them",
        paper="2503.11880",
        weights="equal, without the client itself",
        shares=shares_all,
        receives=lambda slot: slot.role in (OTHERS, "attention"),
        aggregate=aggregate,
        shape=beside_others("open"),
        schedule="joint",
        averages=True,
        leaks="what it sends learns beside a router that has learnt from all text",
    )


def aggregate(
    uploads: Mapping[str, Upload], memory: Memory, context: RoundContext
) -> tuple[dict[str, Download], Memory]:
    """Send client i the mean of the others' g0, and the mean of all attention LoRA."""
    attention = context.mean(_only("attention", upload) for upload in uploads.values())

    def download(client: str | None) -> Download:
        others = (upload for name, upload in uploads.items() if name != client)
        mean = context.mean(_only("generalist", upload) for upload in others)
        return {**attention, **others_of(mean)}

    # Of those who sent nothing, everybody is another, so they get one object.
    downloads = dict.fromkeys(context.clients, download(None))
    for name in context.clients:
        if name in uploads:
            downloads[name] = download(name)
    return downloads, memory


def _only(role: str, upload: Upload) -> Tensors:
    return {slot: upload[slot] for slot in upload if slot.role == role}
