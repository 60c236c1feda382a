"""What travels in a round: bytes of the numbers, by client and by role of the tensor."""

from __future__ import annotations

from collections.abc import Mapping

from comigs.methods.method import Download, Upload
from comigs.runs.metrics import Amount, LastDownload, Traffic, Train, TrainReport
from comigs.server.wire import Format, download_bytes, upload_bytes


def traffic(
    upload: Upload, download: Download, wire_format: Format = "float32", peers: int = 0
) -> Traffic:
    """Return what a client sent and received in an exchange, in bytes as the numbers travel.

    peers: bytes of others' uploads that the client was given to measure.
    """
    by_role: dict[str, Amount] = {}
    for slot, size in upload_bytes(upload, download, wire_format).items():
        by_role[slot.role] = by_role.get(slot.role, Amount()) + Amount(slots=1, bytes=size)
    return Traffic(
        uploaded_bytes=sum(sent.bytes for sent in by_role.values()),
        downloaded_bytes=download_bytes(download, wire_format) + peers,
        uploaded_by_role=by_role,
    )


def traffic_by_client(
    uploads: Mapping[str, Upload],
    downloads: Mapping[str, Download],
    wire_format: Format = "float32",
    reads_peers: bool = False,
) -> dict[str, Traffic]:
    """Return the traffic of every client that sent something.

    reads_peers: each of them was given all the others' uploads to measure.
    """
    given = dict.fromkeys(uploads, 0)
    if reads_peers:
        sizes = {name: download_bytes(upload, wire_format) for name, upload in uploads.items()}
        given = {name: sum(sizes.values()) - size for name, size in sizes.items()}
    return {
        name: traffic(upload, downloads.get(name, {}), wire_format, given[name])
        for name, upload in uploads.items()
    }


def with_traffic(report: TrainReport, moved: Traffic) -> Train:
    """Return a client's report of its training together with what travelled for it."""
    return Train(**report.as_json(), **moved.as_json())


def last_download(client: str, round: int, download: Download, wire_format: Format) -> LastDownload:
    """Return the line of what a client received in the exchange after the last round."""
    size = download_bytes(download, wire_format)
    return LastDownload(round=round, client=client, downloaded_bytes=size)
