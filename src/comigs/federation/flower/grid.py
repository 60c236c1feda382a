"""This module carries bytes as Flower's messages: one value in one record each way, for each array
is two pieces more, and each piece four requests that the SuperLink works on for 14 ms.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from comigs.server.transport import GONE, Failure

REASONS = {
    ErrorCode.CLIENT_APP_RAISED_EXCEPTION: "failed",
    ErrorCode.LOAD_CLIENT_APP_EXCEPTION: "failed: its comigs cannot be loaded",
    ErrorCode.MESSAGE_UNAVAILABLE: "no answer in time",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "no answer in time",
    ErrorCode.NODE_UNAVAILABLE: GONE,
    ErrorCode.INVALID_FAB: "does not run this app",
    ErrorCode.CLIENT_APP_CRASHED: "its app stopped",
}
WHOLE = 4 * 2**20  # bytes of a message in one piece; the gateway lets 6 MiB through
# Flower announces a message before its pieces are there: seconds until a missing one is asked for
# again, at first; each time twice as many.
PIECE_SOON = 0.05
NO_TRAINER = ("FileNotFoundError", "ConnectionRefusedError")


def envelope(raw: bytes) -> RecordDict:
    """Wrap bytes as Flower carries them: as one piece up to WHOLE, else as an array, which Flower
    cuts into pieces.
    """
    if len(raw) <= WHOLE:
        return RecordDict({"comigs": ConfigRecord({"bytes": raw})})
    # The array is never made a numpy one: its data are the bytes.
    array = Array("uint8", (len(raw),), "comigs", raw)
    return RecordDict({"comigs": ArrayRecord({"bytes": array})})


def failure(kind: str) -> RecordDict:
    """Return what goes in place of an answer: the type of an error, and nothing else of it."""
    return RecordDict({"failed": ConfigRecord({"type": kind})})


def opened(content: RecordDict) -> bytes:
    """Return the bytes of an envelope. Raises ValueError for anything else."""
    if content.keys() == {"comigs"}:
        record = content["comigs"]
        value = record.get("bytes") if record.keys() == {"bytes"} else None
        if isinstance(value, Array):
            return value.data
        if isinstance(value, bytes):
            return value
    raise ValueError("another kind of message")


class GridTransport:
    """A grid transport is Flower's grid, as far as a dispatcher needs it."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def online(self, nodes: Collection[int]) -> dict[int, str]:
        """Return those of these nodes that are connected, each with when it (re)started in Flower's
        words.
        """
        connected = {node.node_id: node.last_activated_at for node in self._grid.get_nodes()}
        return {node: connected[node] for node in nodes if node in connected}

    def push(self, node: int, raw: bytes, life: float) -> str | None:
        """Send bytes to a node; return the message's id, or None where it could not be sent.

        life: seconds after which nobody waits for its answer.
        """
        message = Message(envelope(raw), node, "train", ttl=life)
        return next(iter(self._grid.push_messages([message])), None) or None

    def pull(self, ids: Iterable[str]) -> Mapping[str, bytes | Failure]:
        """Return what has come in for these messages, by message."""
        wanted = list(ids)
        came = {}
        for message in self._grid.pull_messages(wanted) if wanted else ():
            asked = message.metadata.reply_to_message_id
            if asked in wanted:
                came[asked] = _content(message)
        return came


def _content(message: Message) -> bytes | Failure:
    if message.has_error():  # its text is the client's, or Flower's: it goes nowhere
        return Failure(REASONS.get(message.error.code, f"Flower's error {message.error.code:d}"))
    if "failed" in message.content.config_records:
        kind = str(message.content.config_records["failed"].get("type", ""))
        return Failure("no trainer there" if kind in NO_TRAINER else f"failed: {plain_word(kind)}")
    try:
        return opened(message.content)
    except ValueError:
        return Failure("another kind of message")


def plain_word(text: str) -> str:
    """Return a type's name that a client sent, or "error" where it does not look like one."""
    return text if re.fullmatch(r"[A-Za-z_]\w{0,63}", text, re.ASCII) else "error"
