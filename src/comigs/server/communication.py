"""What a round moved and where it moved to: bytes by client and role, and how far the clients pull
apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from comigs.methods.method import Download, Tensors, Upload, mean
from comigs.server.wire import Format, download_bytes, upload_bytes


def traffic(
    upload: Upload, download: Download, format: Format = "float32", peers: int = 0
) -> dict[str, Any]:
    """What a client got and sent in an exchange: bytes of the numbers as they travel, and what was
    sent by role.

    peers: bytes of others' uploads that it was given to measure.
    """
    by_role: dict[str, dict[str, int]] = {}
    for slot, size in upload_bytes(upload, download, format).items():
        sent = by_role.setdefault(slot.role, {"slots": 0, "bytes": 0})
        sent["slots"] += 1
        sent["bytes"] += size
    return {
        "uploaded_bytes": sum(sent["bytes"] for sent in by_role.values()),
        "downloaded_bytes": download_bytes(download, format) + peers,
        "uploaded_by_role": by_role,
    }


def traffics(
    uploads: Mapping[str, Upload], downloads: Mapping[str, Download], format: Format = "float32",
    reads_peers: bool = False,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """`traffic` of every client that sent something. reads_peers: each was given all the others'
    uploads too.
    """
    sizes = (
        {name: download_bytes(upload, format) for name, upload in uploads.items()}
        if reads_peers
        else {}
    )
    everything = sum(sizes.values())
    return {
        name: traffic(upload, downloads.get(name, {}), format, everything - sizes.get(name, 0))
        for name, upload in uploads.items()
    }


def last_download(client: str, round: int, download: Download, format: Format) -> dict[str, Any]:
    """The line of what a client got in the exchange after the last round."""
    return {
        "kind": "download", "round": round, "client": client, "downloaded_bytes": download_bytes(download, format)
    }  # fmt: skip


def drift(uploads: Mapping[str, Upload], sent: Mapping[str, Download]) -> float | None:
    """How far clients pull apart: mean distance of an upload from the mean upload, over the length
    of the mean's step away from the mean of what they were sent.

    None in the first round, which starts from no download, and where clients share nothing or
    unequal shapes or none sent anything.
    """
    starts = {name: sent.get(name, {}) for name in uploads}
    distinct = {id(tensors): tensors for tensors in (*uploads.values(), *starts.values())}
    shapes = {
        frozenset((slot, t.shape) for slot, t in tensors.items()) for tensors in distinct.values()
    }
    if len(shapes) != 1 or not next(iter(shapes)):
        return None
    center = mean(uploads.values())
    step = _distance(center, mean(starts.values()))
    apart = sum(_distance(upload, center) for upload in uploads.values()) / len(uploads)
    return apart / step if step > 0 else None


def _distance(a: Tensors, b: Tensors) -> float:
    return math.sqrt(
        sum(float((tensor.double() - b[slot]).square().sum()) for slot, tensor in a.items())
    )
