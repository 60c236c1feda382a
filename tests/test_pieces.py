"""Answers whose pieces come late, or never: nobody else's waits for them."""

from __future__ import annotations

import time
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.task_identity import TaskIdentity

from comigs.federation.flower.grid import WHOLE, GridTransport, envelope
from comigs.federation.flower.pieces import Arrivals
from comigs.server.transport import Failure

MOST = 2 * WHOLE  # bytes of an answer


class SuperLink:
    """Flower's, as far as a grid asks it: an answer is announced once, and has pieces."""

    def __init__(self):
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        self.answers, self.pieces, self.lost, self.asked, self.confirmed = {}, {}, set(), [], []

    def answer(self, asked, raw):
        """Announce an answer; return what its pieces are, none of which is there."""
        question = Message(RecordDict(), 7, "train")
        question.metadata.__dict__["_message_id"] = asked
        content = envelope(raw) if isinstance(raw, bytes) else raw
        reply = Message(content, reply_to=question)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        self.answers[asked] = reply
        return {id: piece.deflate() for id, piece in get_all_nested_objects(reply).items()}

    def PullMessages(self, request):  # noqa: N802
        self.asked += request.message_ids
        came = [self.answers.pop(id) for id in list(request.message_ids) if id in self.answers]
        bare = [Message(RecordDict(), reply_to=_question(reply)) for reply in came]
        for one, reply in zip(bare, came, strict=True):
            one.metadata.__dict__["_message_id"] = reply.metadata.message_id
        return PullAppMessagesResponse(
            messages_list=map(message_to_proto, bare),
            message_object_trees=map(get_object_tree, came),
        )

    def PullObject(self, request):  # noqa: N802
        found, content = request.object_id not in self.lost, self.pieces.get(request.object_id)
        return PullObjectResponse(
            object_found=found, object_available=content is not None, object_content=content or b""
        )

    def ConfirmMessageReceived(self, request):  # noqa: N802
        self.confirmed.append(request.message_object_id)


def _question(reply):
    question = Message(RecordDict(), 7, "train")
    question.metadata.__dict__["_message_id"] = reply.metadata.reply_to_message_id
    return question


@pytest.fixture
def link():
    return SuperLink()


@pytest.fixture
def transport(link):
    grid = SimpleNamespace(
        _runtime_client=link, node=Node(node_id=1), run=SimpleNamespace(run_id=1)
    )
    arrivals = Arrivals(lambda: MOST)
    return GridTransport(SimpleNamespace(pull_messages=lambda ids: arrivals.pull(grid, ids)))


@pytest.mark.parametrize("raw", [b"hers", b"0" * (WHOLE + 1)])
def test_an_answer_whose_pieces_do_not_come_holds_up_no_other(link, transport, raw):
    """A device that dies in the middle of sending held up everybody for three minutes."""
    late, there = link.answer("to-ann", raw), link.answer("to-bob", b"his")
    link.pieces |= there
    began = time.monotonic()
    assert transport.pull(["to-ann", "to-bob"]) == {"to-bob": b"his"}
    assert transport.pull(["to-ann"]) == {}
    assert time.monotonic() - began < 10

    # piece by piece they come after all
    for id in list(late)[:-1]:
        link.pieces[id] = late[id]
        assert transport.pull(["to-ann"]) == {}
    link.pieces |= late
    assert transport.pull([]) == {}
    assert transport.pull(["to-ann"]) == {"to-ann": raw}
    assert len(link.asked) == 2 and len(link.confirmed) == 2  # each once


def test_pieces_that_the_superlink_has_given_up_are_no_answer(link, transport):
    pieces = link.answer("to-ann", b"hers")
    assert transport.pull(["to-ann"]) == {}
    link.lost |= set(pieces)
    assert transport.pull(["to-ann"]) == {"to-ann": Failure("no answer in time")}
    assert not link.confirmed


def array(data):
    return RecordDict({"comigs": ArrayRecord({"bytes": Array("uint8", (1,), "comigs", data)})})


def changed(pieces, kind, change):
    """The pieces, where those of a kind are others under the same ids."""
    return {id: change(raw) if raw.startswith(kind) else raw for id, raw in pieces.items()}


def no_message(pieces):
    """Another kind of piece is in the place of the message."""
    (record,) = [raw for raw in pieces.values() if raw.startswith(b"RecordDict")]
    return changed(pieces, b"Message", lambda raw: record)


def no_children(pieces):
    return changed(
        pieces, b"Message", lambda raw: b" ".join([b"Message", b"", *raw.split(b" ", 2)[2:]])
    )


def a_stranger(pieces):
    """Its head names a piece that is not among its pieces."""
    (id,) = [id for id, raw in pieces.items() if raw.startswith(b"RecordDict")]
    return changed(pieces, b"Message", lambda raw: raw.replace(id.encode(), b"0" * 64))


def noise(pieces):
    return changed(pieces, b"Message", lambda raw: b"noise")


def to_another(pieces):
    """It says that it answers what somebody else was asked."""
    return changed(pieces, b"Message", lambda raw: raw.replace(b"to-ann", b"to-bob"))


@pytest.mark.parametrize("lie", [no_message, no_children, a_stranger, noise, to_another])
def test_pieces_that_make_no_answer_are_their_senders_fault_alone(link, transport, lie):
    """Whatever Flower raises of them had ended the run, and each resume of it."""
    link.pieces |= lie(link.answer("to-ann", b"hers")) | link.answer("to-bob", b"his")
    came = transport.pull(["to-ann", "to-bob"])
    assert came == {"to-ann": Failure("another kind of message"), "to-bob": b"his"}
    assert len(link.confirmed) == 2 and transport.pull(["to-ann"]) == {}


def test_an_array_that_names_its_chunks_too_often_is_not_made(link, transport, monkeypatch):
    """A message of a few bytes could otherwise take all of the server's memory."""
    monkeypatch.setattr("flwr.app.message.array.FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", 100)
    monkeypatch.setattr("tests.test_pieces.MOST", 1500)
    link.pieces |= link.answer("to-ann", array(b"0" * 2000)) | link.answer(
        "to-bob", array(b"1" * 1000)
    )
    came = transport.pull(["to-ann", "to-bob"])
    assert came == {"to-ann": Failure("another kind of message"), "to-bob": b"1" * 1000}


def test_an_array_of_arrays_is_not_made(link, transport, monkeypatch):
    """Each level of them would make it as many times larger again."""
    monkeypatch.setattr("flwr.app.message.array.FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", 100)
    pieces = link.answer("to-ann", array(b"0" * 200))
    inner = link.answer("to-nobody", array(b"1" * 100))
    (one,) = [raw for raw in inner.values() if raw.startswith(b"Array ")]
    (chunk,) = [id for id, raw in pieces.items() if raw.startswith(b"ArrayChunk")]
    link.pieces |= {**pieces, **inner, chunk: one}
    with patch.object(Array, "inflate", side_effect=AssertionError("made")) as made:
        assert transport.pull(["to-ann"]) == {"to-ann": Failure("another kind of message")}
    assert not made.called
