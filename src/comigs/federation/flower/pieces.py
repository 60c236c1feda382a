"""This module takes each answer in as its pieces come, so that nobody waits for another's.

Flower announces an answer before its pieces are there, and its grid then waits for them: three
minutes where the device has died in between, in which it takes nobody else's answer. Flower 1.41
has no setting for it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from flwr.app import Array, Message, RecordDict
from flwr.app.error import Error
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_head_values_from_object_content,
    get_object_type_from_object_content,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectUnavailableError,
    inflate_object_from_contents,
)
from flwr.superlink.grid.http_grid import HttpGrid

from comigs.federation.flower.grid import PIECE_SOON
from comigs.federation.security.answers import largest_answer

TRIES = 3  # looks for pieces that are not there yet, before others have their turn
CHUNK = ArrayChunk.__qualname__


@dataclass
class Coming:
    """An answer is coming. asked: the message it answers. pieces: their ids; unseen: of those that
    were never there when we looked.
    """

    asked: str
    pieces: list[str]
    unseen: list[str]


class Arrivals:
    """Arrivals are the answers that were announced and are not here in whole."""

    def __init__(self, most: Callable[[], int]) -> None:
        """Begin with none. most(): bytes that an answer may have."""
        self._most = most
        self._coming: dict[str, Coming] = {}

    def pull(self, grid: HttpGrid, message_ids: Iterable[str]) -> list[Message]:
        """Return what has come in for these messages: whole answers, and errors."""
        # An answer is announced once, and its message is not known any more after that.
        wanted = set(message_ids)
        asked = wanted - {coming.asked for coming in self._coming.values()}
        if asked:
            said = grid._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=asked))
            for proto, tree in zip(said.messages_list, said.message_object_trees, strict=True):
                pieces = [piece.object_id for piece in iterate_object_tree(tree)]
                of = proto.metadata.reply_to_message_id
                self._coming[proto.metadata.message_id] = Coming(of, pieces, list(pieces))

        # A piece is there a moment after it was announced; what is not is looked for the next time.
        came = self._take(grid, wanted)
        for number in range(TRIES):
            if not any(coming.asked in wanted for coming in self._coming.values()):
                break
            time.sleep(2**number * PIECE_SOON)
            came += self._take(grid, wanted)
        return came

    def _take(self, grid: HttpGrid, wanted: set[str]) -> list[Message]:
        """Take what is here in whole, or never will be."""
        came = []
        for answer, coming in list(self._coming.items()):
            if coming.asked not in wanted:
                continue
            if (message := _whole(grid, answer, coming, self._most)) is not None:
                del self._coming[answer]
                came.append(message)
        return came


def _whole(grid: HttpGrid, answer: str, coming: Coming, most: Callable[[], int]) -> Message | None:
    """Return an answer of at most `most()` bytes, or None while pieces of it are not there yet.

    In place of what is none, or larger, comes one without content.
    """
    client, run = grid._runtime_client, grid.run.run_id
    pull = make_pull_object_fn_protobuf(client.PullObject, grid.node, run)
    # Nothing of an answer is kept before all is there: it may be nobody's any more.
    here: dict[str, bytes] = {}
    try:
        while coming.unseen:
            here[coming.unseen[-1]] = pull(coming.unseen[-1])
            coming.unseen.pop()
        for piece in coming.pieces:
            if piece not in here:
                here[piece] = pull(piece)
    except ObjectUnavailableError:
        return None
    except ObjectPullError:
        # Its sender was gone for so long that the SuperLink has given it up.
        error = Error(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, "its pieces did not come")
        return Message(error, reply_to=_question(grid, coming))
    client.ConfirmMessageReceived(
        ConfirmMessageReceivedRequest(node=grid.node, run_id=run, message_object_id=answer)
    )

    # Flower has looked at no more than the form of each piece, and raises whatever comes up.
    with suppress(Exception):
        _require_size(here, most())
        message = inflate_object_from_contents(answer, here)
        if isinstance(message, Message) and message.metadata.reply_to_message_id == coming.asked:
            message.metadata.__dict__["_message_id"] = answer
            return message
    return Message(RecordDict(), reply_to=_question(grid, coming))


def _question(grid: HttpGrid, coming: Coming) -> Message:
    """Return what stands for the message that an answer is to."""
    message = Message(RecordDict(), grid.node.node_id, "train")
    message.metadata.__dict__["_message_id"] = coming.asked
    return message


def _require_size(pieces: Mapping[str, bytes], most: int) -> None:
    """Raise ValueError where the arrays that pieces make are larger than `most` bytes together.

    An array names its chunks by their numbers, and may name each as often as it likes. Of pieces
    that make nothing, anything may be raised.
    """
    size = 0
    for content in pieces.values():
        kind, chunks, _ = get_object_head_values_from_object_content(content)
        if kind != Array.__qualname__:
            continue
        if any(get_object_type_from_object_content(pieces[id]) != CHUNK for id in chunks):
            raise ValueError("an array of something else than chunks")
        named = json.loads(get_object_body(content, Array))["arraychunk_ids"]
        size += sum(len(pieces[chunks[number]]) for number in named)
    if size > most:
        raise ValueError(f"arrays of {size:,} bytes, where at most {most:,} were expected")


def take_answers_one_by_one(federation: Path) -> None:
    """Make Flower's grid take each answer when it is there in whole. federation: its folder."""
    arrivals = Arrivals(partial(largest_answer, federation))

    def pull_messages(grid: HttpGrid, message_ids: Iterable[str]) -> list[Message]:
        return arrivals.pull(grid, message_ids)

    HttpGrid.pull_messages = pull_messages  # type: ignore[assignment]
