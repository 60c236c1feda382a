"""What the server has for each client and has not delivered yet, and how it is kept on disk.

Many clients wait for the same: what they share is one object, so that an idle client costs the
server a number.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from comigs.methods.method import Download, Memory, Upload
from comigs.slots import Slot


def next_downloads(
    waiting: Mapping[str, Download], merged: Mapping[str, Download], delivered: Collection[str]
) -> dict[str, Download]:
    """Return what each client gets next: the newest of every slot that it has not had yet.

    waiting: what was to be delivered in this round. merged: what the server made of it. Updates,
    which are added and not written, wait in line behind those a client has missed.
    """
    downloads, nothing = dict(merged), dict[Slot, Tensor]()
    equal = {_content(download): download for download in _distinct(merged)}
    made: dict[tuple[int, int], Download] = {}
    for name in sorted(waiting.keys() - set(delivered)):
        missed, new = waiting[name], merged.get(name, nothing)
        # Clients that have missed the same and get the same share one download.
        pair = id(missed), id(new)
        if pair not in made:
            newest = {**missed, **new, **_both_updates(missed, new)}
            made[pair] = equal.setdefault(_content(newest), newest)
        downloads[name] = made[pair]
    return downloads


def _both_updates(missed: Download, new: Download) -> Download:
    """Return two factored updates of one linear as one, for every linear that has two."""
    both = {}
    for slot in missed.keys() & new.keys():
        if slot.role == "update":
            side = 0 if slot.matrix == "A" else 1
            both[slot] = torch.cat([missed[slot], new[slot]], dim=side)
    return both


def _distinct(downloads: Mapping[str, Download]) -> list[Download]:
    return list({id(download): download for download in downloads.values()}.values())


def _content(download: Download) -> frozenset[tuple[Slot, int]]:
    return frozenset((slot, id(tensor)) for slot, tensor in download.items())


def discounted(
    late: Upload,
    started: Download | None,
    now: Download | None,
    weight: float,
    expected: Collection[Slot],
) -> Upload | None:
    """Return what a late upload counts for in the round in which it comes in.

    It is now + weight * (late - started), slot by slot. started: the download it was trained from.
    now: the download of this round. The answer is None where a slot of this round's uploads
    (`expected`) is not in all three, as in methods that share by turns or merge into the base: a
    part of an upload is of no use.
    """
    if started is None or now is None:
        return None
    counts = {}
    for slot in expected:
        if slot not in late or slot not in started or slot not in now:
            return None
        counts[slot] = now[slot] + weight * (late[slot] - started[slot])
    return counts


Started = Mapping[str, Mapping[int, Download]]  # client -> round -> what a late upload started from


def pack_server(
    downloads: Mapping[str, Download], memory: Memory, started: Started | None = None
) -> dict[str, Tensor]:
    """Return what the server goes on from, as named tensors: each tensor once, and tables.

    "tensor/N": the tensors, copied: views of one merged tensor, which a method may hand out, cannot
    be saved as they are. "memory" and "download/M": which of them is where. "client": which
    download each client gets. "started", where there are any: which one a late upload of
    ROUND/CLIENT is a step from.
    """
    # A place is whatever holds tensors under names.
    begun = {
        f"{round}/{client}": download
        for client, rounds in (started or {}).items()
        for round, download in rounds.items()
    }
    distinct = _distinct({**{f"now/{name}": d for name, d in downloads.items()}, **begun})
    places: dict[str, dict[str, Tensor]] = {"memory": dict(memory)}
    for number, download in enumerate(distinct):
        places[f"download/{number}"] = {str(slot): tensor for slot, tensor in download.items()}

    # However many places hold a tensor, it is written once; a place says by number what it holds.
    packed: dict[str, Tensor] = {}
    numbers: dict[int, int] = {}
    tables: dict[str, Tensor] = {}
    for name, place in places.items():
        for tensor in place.values():
            if id(tensor) not in numbers:
                numbers[id(tensor)] = len(numbers)
                packed[f"tensor/{numbers[id(tensor)]}"] = tensor.clone()
        tables |= _table(name, {key: numbers[id(tensor)] for key, tensor in place.items()})
    of_download = {id(download): number for number, download in enumerate(distinct)}
    chosen = {client: of_download[id(download)] for client, download in downloads.items()}
    tables |= _table("client", chosen)
    if begun:
        tables |= _table("started", {key: of_download[id(d)] for key, d in begun.items()})
    return packed | tables


def unpack_server(packed: Mapping[str, Tensor]) -> tuple[dict[str, Download], Memory]:
    """Return the downloads and the memory that `pack_server` was given."""
    memory = {key: packed[f"tensor/{n}"] for key, n in _read_table("memory", packed).items()}
    return _read_downloads("client", packed), memory


def unpack_started(packed: Mapping[str, Tensor]) -> dict[str, dict[int, Download]]:
    """Return what late uploads started from, as `pack_server` was given it."""
    started: dict[str, dict[int, Download]] = {}
    if "started/names" in packed:
        for key, download in _read_downloads("started", packed).items():
            round, _, client = key.partition("/")
            started.setdefault(client, {})[int(round)] = download
    return started


def _read_downloads(name: str, packed: Mapping[str, Tensor]) -> dict[str, Download]:
    """Return the downloads of a table; those that are the same are one object."""
    chosen = _read_table(name, packed)
    distinct: dict[int, Download] = {}
    for number in sorted(set(chosen.values())):
        slots = _read_table(f"download/{number}", packed)
        distinct[number] = {Slot.parse(slot): packed[f"tensor/{n}"] for slot, n in slots.items()}
    return {key: distinct[number] for key, number in chosen.items()}


def _table(name: str, numbers: Mapping[str, int]) -> dict[str, Tensor]:
    """Return two tensors, however long the table is: names as JSON in bytes, and numbers."""
    names = torch.tensor(list(json.dumps(list(numbers)).encode()), dtype=torch.uint8)
    return {
        f"{name}/names": names,
        f"{name}/numbers": torch.tensor(list(numbers.values()), dtype=torch.int64),
    }


def _read_table(name: str, packed: Mapping[str, Tensor]) -> dict[str, int]:
    names = json.loads(bytes(packed[f"{name}/names"].tolist()))
    return dict(zip(names, packed[f"{name}/numbers"].tolist(), strict=True))
