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
    """What each client gets next: the newest of every slot that it has not had yet.

    waiting: what was to be delivered in this round. merged: what the server made of it. Updates,
    which are added and not written, wait in line behind those a client has missed.
    """
    downloads, nothing = dict(merged), dict[Slot, Tensor]()
    equal = {_content(download): download for download in _distinct(merged)}
    made: dict[tuple[int, int], Download] = {}
    for name in sorted(waiting.keys() - set(delivered)):
        missed, new = waiting[name], merged.get(name, nothing)
        pair = id(missed), id(new)
        if pair not in made:
            newest = {**missed, **new, **_both_updates(missed, new)}
            made[pair] = equal.setdefault(_content(newest), newest)
        downloads[name] = made[pair]
    return downloads


def _both_updates(missed: Download, new: Download) -> Download:
    """Two factored updates of one linear as one."""
    both = {slot for slot in missed.keys() & new.keys() if slot.role == "update"}
    return {
        slot: torch.cat([missed[slot], new[slot]], dim=0 if slot.matrix == "A" else 1)
        for slot in both
    }


def _distinct(downloads: Mapping[str, Download]) -> list[Download]:
    return list({id(download): download for download in downloads.values()}.values())


def _content(download: Download) -> frozenset[tuple[Slot, int]]:
    return frozenset((slot, id(tensor)) for slot, tensor in download.items())


def discounted(
    late: Upload,
    started: Download | None,
    now: Download | None,
    share: float,
    expected: Collection[Slot],
) -> Upload | None:
    """What a late upload counts for in the round in which it comes in: now + share * (late -
    started), slot by slot.

    started: the download it was trained from. now: the download of this round. None where a slot of
    this round's uploads (`expected`) is not in all three, as in methods that share by turns or
    merge into the base: a part of an upload is of no use.
    """
    if (
        started is None
        or now is None
        or not all(slot in late and slot in started and slot in now for slot in expected)
    ):
        return None
    return {slot: now[slot] + share * (late[slot] - started[slot]) for slot in expected}


def pack_server(downloads: Mapping[str, Download], memory: Memory) -> dict[str, Tensor]:
    """What the server goes on from, as named tensors: each tensor once, and tables of names and
    numbers.

    "tensor/N": the tensors, copied: views of one merged tensor, which a method may hand out, cannot
    be saved as they are. "memory" and "download/M": which of them is where. "client": which
    download each client gets.
    """
    distinct = _distinct(downloads)
    places: dict[str, dict[str, Tensor]] = {"memory": dict(memory)}
    places |= {
        f"download/{m}": {str(s): t for s, t in download.items()}
        for m, download in enumerate(distinct)
    }
    tensors = {id(tensor): tensor for place in places.values() for tensor in place.values()}
    of_tensor = {key: number for number, key in enumerate(tensors)}
    of_download = {id(download): number for number, download in enumerate(distinct)}
    packed = {f"tensor/{of_tensor[key]}": tensor.clone() for key, tensor in tensors.items()}
    for name, place in places.items():
        packed |= _table(name, {key: of_tensor[id(tensor)] for key, tensor in place.items()})
    return packed | _table(
        "client", {client: of_download[id(download)] for client, download in downloads.items()}
    )


def unpack_server(packed: Mapping[str, Tensor]) -> tuple[dict[str, Download], Memory]:
    """The inverse of `pack_server`."""
    chosen = _read_table("client", packed)
    distinct: list[Download] = [
        {
            Slot.parse(slot): packed[f"tensor/{n}"]
            for slot, n in _read_table(f"download/{m}", packed).items()
        }
        for m in range(max(chosen.values(), default=-1) + 1)
    ]
    memory = {key: packed[f"tensor/{n}"] for key, n in _read_table("memory", packed).items()}
    return {client: distinct[m] for client, m in chosen.items()}, memory


def _table(name: str, numbers: Mapping[str, int]) -> dict[str, Tensor]:
    """Two tensors, however long it is: the names as JSON in bytes, and the numbers."""
    names = torch.tensor(list(json.dumps(list(numbers)).encode()), dtype=torch.uint8)
    return {
        f"{name}/names": names,
        f"{name}/numbers": torch.tensor(list(numbers.values()), dtype=torch.int64),
    }


def _read_table(name: str, packed: Mapping[str, Tensor]) -> dict[str, int]:
    names = json.loads(bytes(packed[f"{name}/names"].tolist()))
    return dict(zip(names, packed[f"{name}/numbers"].tolist(), strict=True))
