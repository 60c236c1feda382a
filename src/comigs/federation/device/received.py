"""This module reads what a server sent to a device: its request, a download, and others' uploads to
measure.
"""

from __future__ import annotations

import math

from torch import Tensor

from comigs.client.client import Client
from comigs.federation import messages
from comigs.federation.device.device_run import DeviceRun, Refused
from comigs.federation.device.limits import Limits
from comigs.federation.messages import Request, our_version
from comigs.federation.sum_messages import ROWS
from comigs.server import wire
from comigs.slots import Slot

MOST_HEADER = 1 << 25  # bytes of a request's head and of the list of its tensors


def read_request(raw: bytes, limits: Limits) -> tuple[Request, dict[str, Tensor]]:
    """Return a request and its tensors. Raises Refused where it is none, or of another comigs."""
    try:
        request, tensors = wire.unpack(raw, messages.REQUESTS, limits.message, MOST_HEADER)
    except wire.WireError as error:
        raise Refused("unreadable", f"the server sent {error}") from None
    if request.comigs != our_version():
        raise Refused(
            "version",
            f"the server has comigs {request.comigs}, this device {our_version()}; "
            "install the same one",
        )
    return request, tensors


def read_download(tensors: wire.Encoded) -> dict[Slot, Tensor]:
    """Return the download of a request. Raises Refused where it is none."""
    try:
        return wire.decode_download({name: t for name, t in tensors.items() if name != ROWS})
    except wire.WireError as error:
        raise Refused("unreadable", f"the server sent {error}") from None


def probe(request: Request, tensors: wire.Encoded, run: DeviceRun, client: Client) -> bytes:
    """Measure others' uploads in this client's place, and answer. Nothing is kept.

    Raises Refused where the method measures none, where another round was the last here, and where
    an upload is not as it should be.
    """
    asked = f"asked to measure round {request.round}"
    # What it measures is exact, so nobody gets it whose method does without.
    if not run.method.reads_peers:
        raise Refused("refused", f"{asked}, but {run.config.method} measures nobody's uploads")
    if run.answered != request.round:
        raise Refused("ahead", f"{asked}, but round {run.answered} was the last here")

    # Uploads come without names, by their numbers.
    uploads: dict[str, dict[str, Tensor]] = {str(number): {} for number in range(request.probed)}
    for name, tensor in tensors.items():
        number, _, slot = name.partition("/")
        if number not in uploads:
            raise Refused("unreadable", "the server sent a tensor of nobody's upload")
        uploads[number][slot] = tensor
    nats = client.probe(
        {number: read_download(of) for number, of in uploads.items()}, request.round
    )
    if not all(map(math.isfinite, nats.values())):
        where = f"{run.folder.path}: round {request.round}"
        raise Refused("loss", f"{where}: another client's upload has no finite loss here")
    head = messages.Probed(run=request.run, round=request.round, nats=list(nats.values()))
    return wire.pack(head)
