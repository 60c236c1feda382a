"""A device's SuperNode answers each message with what its trainer says to it, whenever an earlier
message's run has ended, and runs nothing that it was sent.

Flower's own messages and pieces are at work here; only the SuperLink's words are given to it.
"""

from __future__ import annotations

import random
import resource
import subprocess
import sys
import threading
from hashlib import sha256
from types import SimpleNamespace

import httpx
import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectUnavailableError,
    inflate_object_from_contents,
    pull_objects,
)
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity

from comigs.federation.device import trainer_socket
from comigs.federation.flower import supernode
from comigs.federation.flower.grid import WHOLE, envelope, opened
from comigs.federation.security import pki
from comigs.federation.security.gateway import PIECE, SMALL
from tests.conftest import until
from tests.local_grid import everything

DEAD, RUNNING, NODE, APP = 1, 2, 7, b"the app that was pinned"


class Link:
    """A SuperLink with one message of a run that ends at one of the calls for it, and two of a run
    that goes on. answers: what has come, by the message's id.
    """

    def __init__(self, ends_at="never", app=APP, late=0):
        self.ends_at, self.app, self.late = ends_at, app, late
        self.pieces, self.asked, self.answers = {}, [], {}
        questions = [(DEAD, b"of a run that ends"), (RUNNING, b"first"), (RUNNING, b"second")]
        self.waiting = [self.message(*question) for question in questions]
        self.ids = [message.metadata.message_id for message in self.waiting]
        replies = (self.receive, self.send, self.get_run, self.get_fab)
        self.calls = (NODE, *replies, self.pull, self.push, self.confirm)

    def message(self, run, raw):
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run, 1
        message = Message(envelope(raw), NODE, "train", ttl=600)
        message.metadata.__dict__["_message_id"] = message.object_id
        for name, piece in get_all_nested_objects(message).items():
            self.pieces[name] = piece.deflate()
        return message

    def end(self, run, call):
        if run == DEAD and self.ends_at == call:
            raise RunNotRunningException

    def receive(self):
        if not self.waiting:
            return None
        message = self.waiting.pop(0)
        return message, get_object_tree(message)

    def get_run(self, run):
        self.end(run, "get-run")
        return SimpleNamespace(fab_hash=f"of {run}")

    def get_fab(self, name, run):
        assert name == f"of {run}"
        self.asked.append(run)
        return SimpleNamespace(content=self.app)

    def pull(self, run, piece):
        self.end(run, "pull-object")
        self.late -= 1
        if self.late >= 0:
            raise ObjectUnavailableError(piece)
        return self.pieces[piece]

    def confirm(self, run, message):
        self.end(run, "confirm")

    def send(self, reply, tree, seconds):
        self.end(reply.metadata.run_id, "push-messages")
        self.reply, self.wanted = reply.metadata.reply_to_message_id, self.names(tree)
        self.answers[self.reply] = {}
        return set(self.wanted), f"session {self.reply}"

    def names(self, tree):
        return [tree.object_id, *(name for child in tree.children for name in self.names(child))]

    def push(self, run, session, name, piece):
        self.end(run, "push-object")
        assert session == f"session {self.reply}"
        self.answers[self.reply][name] = piece

    def answer(self, message):
        """The bytes that came for a message."""
        pieces = self.answers[message]
        (whole,) = (name for name, piece in pieces.items() if piece.startswith(b"Message "))
        return opened(
            inflate_object_from_contents(whole, pieces, keep_object_contents=True).content
        )


@pytest.fixture
def trainer(tmp_path_factory):
    """The socket of a trainer that says "yes, " and the question."""
    socket = tmp_path_factory.mktemp("t") / "trainer"
    words = (socket, trainer_socket.key_beside(socket), lambda raw: b"yes, " + raw)
    threading.Thread(target=trainer_socket.serve, args=words, daemon=True).start()
    until(socket.exists)
    return socket


def node(link, trainer):
    return supernode.SuperNode(sha256(APP).hexdigest(), trainer, link.calls)


@pytest.mark.parametrize(
    "ends_at", ["never", "get-run", "pull-object", "confirm", "push-messages", "push-object"]
)
def test_a_run_that_ends_amid_a_message_costs_no_later_reply(ends_at, trainer):
    link = Link(ends_at)
    device = node(link, trainer)
    assert [device.answer_next() for _ in range(4)] == [True, True, True, False]
    assert link.answer(link.ids[1]) == b"yes, first" and link.answer(link.ids[2]) == b"yes, second"
    assert (link.answers.get(link.ids[0], {}) != {}) == (ends_at == "never")
    # Whose app was found to be the right one is not asked for again.
    assert link.asked == ([RUNNING] if ends_at == "get-run" else [DEAD, RUNNING])


def test_what_goes_wrong_with_one_message_costs_no_other(trainer):
    link = Link()
    broken = next(iter(get_all_nested_objects(link.waiting[0])))
    link.pieces[broken] = b"not such a piece"
    device = node(link, trainer)
    assert [device.answer_next() for _ in range(3)] == [True] * 3
    assert link.answers.keys() == {*link.ids[1:]}


def test_an_app_that_was_not_pinned_ends_the_device_before_its_trainer_hears_of_it(tmp_path):
    link = Link(app=b"another")
    with pytest.raises(supernode.OtherApp, match=sha256(b"another").hexdigest()):
        node(link, tmp_path / "nobody").answer_next()
    assert not link.answers


def test_a_piece_that_is_late_is_waited_for_briefly(trainer, monkeypatch):
    """A message is announced before its pieces are there."""
    given = {}

    def pulling(*words, **settings):
        given.update(settings)
        return pull_objects(*words, **settings)

    monkeypatch.setattr("flwr.supercore.inflatable.inflatable_utils.pull_objects", pulling)
    link = Link(late=3)
    assert node(link, trainer).answer_next()
    assert link.answer(link.ids[0]) == b"yes, of a run that ends"
    assert given["initial_backoff"] == supernode.PIECE_SOON < 1


@pytest.mark.parametrize(("size", "count"), [(0, 3), (WHOLE, 3), (WHOLE + 1, 5), (3 * WHOLE, 7)])
def test_a_small_message_is_three_pieces_and_none_is_too_large_for_the_gateway(size, count):
    raw = random.Random(size).randbytes(size)
    message = Link().message(RUNNING, raw)
    pieces = {name: part.deflate() for name, part in get_all_nested_objects(message).items()}
    assert len(pieces) == count and max(map(len, pieces.values())) < PIECE - SMALL
    made = inflate_object_from_contents(message.object_id, pieces, keep_object_contents=True)
    assert opened(made.content) == raw


def test_questions_become_rarer_the_longer_nothing_comes_and_the_more_the_server_has_to_do():
    pauses = [supernode.pause(quiet, 0.0) for quiet in (0, 5, 20, 40, 60, 3600)]
    assert pauses == [supernode.SOON, supernode.SOON, 1.0, 2.0, 3.0, supernode.SELDOM]
    assert supernode.pause(0.0, 0.3) == 1.5 and supernode.pause(0.0, 9.0) == supernode.SELDOM


def test_of_an_error_only_the_type_leaves_the_device(tmp_path):
    question = Link().message(RUNNING, b"request")
    reply = supernode.reply_to(question, tmp_path / "nowhere-secret" / "trainer")
    assert not reply.has_error() and b"FileNotFoundError" in everything(reply)
    assert b"secret" not in everything(reply)
    strange = Message(RecordDict(), NODE, "train")
    assert b"ValueError" in everything(supernode.reply_to(strange, tmp_path))


def test_a_server_with_much_to_do_is_asked_again_to_give_up_the_place_of_who_was_killed(
    tmp_path, monkeypatch
):
    """Else it keeps the place for a minute, and refuses the device that was started again."""
    monkeypatch.chdir(tmp_path)
    authority, _ = pki.new_authority("test")
    (tmp_path / "ca.pem").write_text(authority)
    (tmp_path / "online").write_text(str(NODE))
    private = load_ssh_private_key(pki.new_device_key()[0].encode(), None)
    left = []

    def send(client, context):
        left.append(context.message.node_id)
        if len(left) == 1:
            raise httpx.ReadTimeout("busy")
        return httpx.Response(200, request=context.request)

    monkeypatch.setattr(supernode.FleetHttpClient, "_send", send)
    keys = (private, private.public_key())
    supernode._leave(tmp_path / "online", "127.0.0.1:1", keys)
    assert left == [NODE, NODE] and not (tmp_path / "online").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the system holds no process to it")
def test_a_message_without_end_takes_no_more_memory_than_is_allowed():
    takes = (
        "from comigs.federation.flower.supernode import bound_memory; bound_memory(100 << 20);"
        "few = bytearray(20 << 20); print('few');"
        "many = bytearray(200 << 20); print('many')"
    )
    done = subprocess.run([sys.executable, "-c", takes], capture_output=True, text=True)
    assert done.stdout == "few\n" and "MemoryError" in done.stderr


def test_where_no_process_is_held_to_its_memory_none_is_refused_any(monkeypatch):
    """macOS takes the bound for that of all addresses, and refuses it."""
    monkeypatch.setattr(sys, "platform", "darwin")
    before = resource.getrlimit(resource.RLIMIT_DATA)
    supernode.bound_memory(1 << 20)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_a_supernode_needs_no_torch():
    """It stays in the device's memory beside the trainer, which has it."""
    check = (
        "import sys, comigs.federation.flower.supernode, comigs.engines.flower.apps;"
        "print(*{'torch', 'transformers'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
