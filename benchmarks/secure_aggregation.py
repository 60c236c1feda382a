"""What secure aggregation costs: bytes and seconds a round of one client and of the server.

    python benchmarks/secure_aggregation.py [--numbers 121344] [--clients 4 16 64] [--rounds 3]

The protocol's own pages do what they do in a federation, and messages are packed as they travel;
nothing is sent. Plain is the same round without sums. Times are CPU seconds (time.process_time),
the best of the rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from comigs.config import UploadSection
from comigs.federation.sum_messages import rows
from comigs.methods.merging import mean
from comigs.server import wire
from comigs.server.secure_sum import party
from comigs.server.secure_sum.opening import unmasked
from comigs.server.secure_sum.primitives import new_seed, private_key, public_name
from comigs.server.secure_sum.session import Session
from comigs.server.secure_sum.uploads import mean_of, to_sum
from comigs.server.validation import common_start, origin_of
from comigs.slots import Slot

HEAD = 4000  # bytes of a config, of losses and the rest of a message's head, which are the same


class Said(wire.Head):
    """A head with what a message has beside tensors: keys and names of members, as hex."""

    keys: str = ""


class Clock:
    """A clock adds up CPU seconds of the parts of a round."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, part: str, do: Callable[[], Any]) -> Any:
        """Return what `do` returns."""
        begin = time.process_time()
        made = do()
        self.seconds[part] = self.seconds.get(part, 0.0) + time.process_time() - begin
        return made


def plain_round(
    uploads: list[dict[Slot, torch.Tensor]], download: dict[Slot, torch.Tensor]
) -> tuple[Clock, int, dict[Slot, torch.Tensor]]:
    """Return the seconds, the bytes of a client and the mean of a round without sums."""
    clock, shapes = Clock(), {slot: tuple(t.shape) for slot, t in download.items()}
    asked = wire.pack(Said(), wire.encode_download(download, "float32"))
    packed = []
    for upload in uploads:
        made = clock.time("client", lambda u=upload: wire.pack(Said(), _encoded(u, download)))
        packed.append(made)

    def merge() -> dict[Slot, torch.Tensor]:
        read = [wire.unpack(raw, SAID, len(raw))[1] for raw in packed]
        return mean(wire.decode(one, shapes, {}, "float32") for one in read)

    return clock, len(asked) + len(packed[0]) + 2 * HEAD, clock.time("server", merge)


def summed_round(
    uploads: list[dict[Slot, torch.Tensor]], download: dict[Slot, torch.Tensor], gone: int
) -> tuple[Clock, int, dict[Slot, torch.Tensor]]:
    """Return the same of a round whose uploads are summed. gone: clients that do not help."""
    clock, limits = Clock(), UploadSection()
    identities = [private_key(new_seed()) for _ in uploads]
    names = [public_name(key) for key in identities]
    session = Session.new("benchmark", 1, names, 0.66)
    shapes = {slot: tuple(t.shape) for slot, t in download.items()}
    begun = origin_of(download, shapes, common_start(1))
    every = Said(keys=" ".join(names))

    # Seal.
    sealed = [clock.time("client", lambda k=key: party.seal(k, session)) for key in identities]
    said = [wire.pack(Said(keys=s.key), rows(s.boxes, names)) for _, s in sealed]
    keys = {name: s.key for name, (_, s) in zip(names, sealed, strict=True)}
    size = len(wire.pack(every)) + len(said[0])

    # Mask.
    total, remembered = np.zeros(0, np.uint32), []
    for number, name in enumerate(names):
        boxes = {n: s.boxes[name] for n, (_, s) in zip(names, sealed, strict=True) if n != name}
        asked = wire.pack(
            Said(keys=every.keys + " ".join(keys.values())),
            wire.encode_download(download, "float32") | rows(boxes, names),
        )

        def masked(number: int = number, boxes: dict[str, bytes] = boxes) -> Any:
            numbers = to_sum(uploads[number], begun, limits, len(names))
            held, made = party.mask(identities[number], sealed[number][0], keys, boxes, numbers)
            return held, wire.pack(Said(), {"sum": torch.from_numpy(made.view(np.int32))})

        held, raw = clock.time("client", masked)
        remembered.append(held)
        made = clock.time("server", lambda r=raw: wire.unpack(r, SAID, len(r))[1]["sum"])
        part = made.numpy().view(np.uint32)
        total = clock.time("server", lambda sum=total, p=part: sum + p if len(sum) else p.copy())
    size += len(asked) + len(raw) + 2 * HEAD

    # Open.
    helped = {}
    for name, held in list(zip(names, remembered, strict=True))[gone:]:
        opened = clock.time("client", lambda h=held, n=name: party.help_open(h, n, names))
        helped[name] = opened
    size += len(wire.pack(every)) + len(wire.pack(Said(), rows(opened.shares, names)))

    def opening() -> dict[Slot, torch.Tensor]:
        plain = unmasked(session, keys, names, total, helped)
        return mean_of(plain, [begun] * len(names), limits, len(names))

    return clock, size + 2 * HEAD, clock.time("server", opening)


def _encoded(
    upload: dict[Slot, torch.Tensor], download: dict[Slot, torch.Tensor]
) -> dict[str, torch.Tensor]:
    return wire.encode(upload, download, "float32", {})[0]


def tensors(numbers: int, seed: int, size: float) -> dict[Slot, torch.Tensor]:
    """Return about so many numbers as LoRA factors of rank 8."""
    random, width = torch.Generator().manual_seed(seed), 192
    made = {}
    for layer in range(max(1, numbers // (16 * width))):
        for matrix, dims in (("A", (8, width)), ("B", (width, 8))):
            drawn = size * torch.randn(dims, generator=random)
            made[Slot(layer, "up", "g0", matrix)] = drawn
    return made


def main() -> None:
    """Print a table."""
    reader = argparse.ArgumentParser()
    reader.add_argument("--numbers", type=int, default=121_344)
    reader.add_argument("--clients", type=int, nargs="+", default=[4, 16, 64])
    reader.add_argument("--rounds", type=int, default=3)
    given = reader.parse_args()
    torch.set_num_threads(1)
    download = tensors(given.numbers, 0, 0.1)
    count = sum(t.numel() for t in download.values())
    print(f"{count:,} numbers ({4 * count / 1e6:.2f} MB) each way, CPU seconds of one thread")
    print("clients | gone | KB plain | KB summed | ratio | client s | server s | plain s | error")
    for clients in given.clients:
        uploads = []
        for number in range(clients):
            moved = tensors(given.numbers, 1 + number, 0.01)
            uploads.append({slot: download[slot] + moved[slot] for slot in download})
        for gone in (0, clients // 4):
            row(uploads, download, gone, given.rounds)


def row(
    uploads: list[dict[Slot, torch.Tensor]],
    download: dict[Slot, torch.Tensor],
    gone: int,
    rounds: int,
) -> None:
    """Measure one number of clients, and print its line."""
    best: dict[str, float] = {}
    for _ in range(rounds):
        plain, plain_bytes, wanted = plain_round(uploads, download)
        clock, size, found = summed_round(uploads, download, gone)
        figures = {
            "client": clock.seconds["client"] / len(uploads),
            "server": clock.seconds["server"],
            "plain": plain.seconds["client"] / len(uploads) + plain.seconds["server"],
        }
        best = {part: min(s, best.get(part, s)) for part, s in figures.items()}
    error = max(float((found[slot] - wanted[slot]).abs().max()) for slot in wanted)
    print(
        f"{len(uploads):7} | {gone:4} | {plain_bytes / 1e3:8.0f} | {size / 1e3:9.0f} | "
        f"{size / plain_bytes:5.3f} | {best['client']:8.3f} | {best['server']:8.3f} | "
        f"{best['plain']:7.3f} | {error:.1e}"
    )


if __name__ == "__main__":
    from pydantic import TypeAdapter

    SAID: TypeAdapter[Said] = TypeAdapter(Said)
    main()
