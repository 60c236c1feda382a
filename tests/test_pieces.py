"""Answers whose pieces come late, or never: nobody else's waits for them."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from flwr.app import Message, RecordDict
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.task_identity import TaskIdentity

from comigs.federation.flower.grid import WHOLE, GridTransport, envelope
from comigs.federation.flower.pieces import Arrivals
from comigs.server.transport import Failure


class SuperLink:
    """Flower's, as far as a grid asks it: an answer is announced once, and has pieces."""

    def __init__(self):
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        self.answers, self.pieces, self.lost, self.asked, self.confirmed = {}, {}, set(), [], []

    def answer(self, asked, raw):
        """Announce an answer; return what its pieces are, none of which is there."""
        question = Message(RecordDict(), 7, "train")
        question.metadata.__dict__["_message_id"] = asked
        reply = Message(envelope(raw), reply_to=question)
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
    arrivals = Arrivals()
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
