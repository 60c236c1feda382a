"""A SuperNode gives each message its own reply, whenever an earlier message's run has ended.

Flower's own loop, state and store are at work here; only the SuperLink's words are given to it.
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from flwr.app import Message
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode import start_client_internal as flower
from flwr.supernode.nodestate import NodeStateFactory

from comigs.federation.flower import supernode
from comigs.federation.flower.grid import envelope

DEAD, RUNNING, LONGEST = 1, 2, 100


class Over(BaseException):
    """Enough of Flower's endless loop."""


class Link:
    """A SuperLink with one message of a run that ends at one of the calls for it, and two of a run
    that goes on. answered: the messages that a ClientApp has answered. replied: those whose replies
    have come.
    """

    def __init__(self, ends_at):
        self.ends_at, self.answered, self.replied = ends_at, set(), []
        self.objects, self.slept = {}, 0
        self.messages = [self.message(run) for run in (DEAD, RUNNING, RUNNING)]
        self.waiting, self.ids = [*self.messages], [m.metadata.message_id for m in self.messages]

    def message(self, run):
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run, 1
        message = Message(envelope(b"a question"), 7, "train", ttl=600)
        message.metadata.__dict__["_message_id"] = message.object_id
        self.objects |= get_all_nested_objects(message)
        return message

    @contextmanager
    def connect(self, *_, **__):
        calls = (self.receive, self.send, None, None, self.pull_object, None, self.confirm)
        yield 7, *calls

    def receive(self):
        """As a server does, ask a device the next thing of a run when it has answered the last."""
        if self.waiting and (len(self.waiting) != 1 or self.ids[1] in self.replied):
            message = self.waiting.pop(0)
            return message, get_object_tree(message)
        return None

    def sleep(self, seconds):
        """Stand in for the loop's own waiting, which has no end."""
        self.slept += 1
        if self.slept == LONGEST or len(self.replied) == 2:
            raise Over
        time.sleep(0.02)

    def pull_object(self, run, object_id):
        if run == DEAD and self.ends_at == "pull-object":
            raise RunNotRunningException
        return self.objects[object_id].deflate()

    def confirm(self, run, message):
        while run == DEAD and self.ends_at == "confirm, answered" and not self.answered:
            time.sleep(0.01)
        if run == DEAD and self.ends_at.startswith("confirm"):
            raise RunNotRunningException

    def send(self, message, tree, seconds):
        if message.metadata.run_id == DEAD:
            raise RunNotRunningException
        self.replied.append(message.metadata.reply_to_message_id)
        return set(), ""


def answer(state, store, link, over):
    """As a ClientApp does, begin with a message at once, wait until all of it is there, answer."""
    while not over.wait(0.01):
        for message in state.get_messages_legacy(is_reply=False, limit=1):
            asked = message.metadata.message_id
            state.record_message_processing_start(asked)
            ids = [node.object_id for node in iterate_object_tree(store.get_object_tree(asked))]
            while b"" in (objects := [store.get(id) for id in ids]) and not over.wait(0.01):
                pass
            if None in objects or b"" in objects:
                continue  # it was given up
            time.sleep(0.05)
            state.record_message_processing_end(asked)
            flower._insert_message(Message(envelope(b"x"), reply_to=message), state, store)
            link.answered.add(asked)


@pytest.mark.parametrize("ends_at", ["never", "pull-object", "confirm", "confirm, answered"])
def test_a_run_that_ends_amid_a_message_costs_no_later_reply(ends_at, tmp_path, monkeypatch):
    link, over, factory = Link(ends_at), threading.Event(), NodeStateFactory(ObjectStoreFactory())
    state, store = factory.state(), factory.objectstore_factory.store()
    for run in (DEAD, RUNNING):
        state.store_run(Run.create_empty(run))

    # What is of the process, and not of a message, is left as it is.
    monkeypatch.setattr(supernode, "connect", link.connect)
    monkeypatch.setattr(supernode.signal, "signal", lambda *_: None)
    monkeypatch.setattr(flower, "register_signal_handlers", lambda **_: None)
    monkeypatch.setattr(flower, "_init_connection", supernode.pinned("app", tmp_path / "online"))
    monkeypatch.setattr(flower, "time", SimpleNamespace(sleep=link.sleep))

    app = threading.Thread(target=answer, args=(state, store, link, over))
    app.start()
    try:
        with pytest.raises(Over):
            flower.start_client_internal(
                state_factory=factory,
                server_address="127.0.0.1:9",
                node_config={},
                insecure=True,
                isolation="process",
            )
    finally:
        over.set()
        app.join()
    assert link.replied == link.ids[1:]
    assert not state.get_messages_legacy(), "something was left in stock"
