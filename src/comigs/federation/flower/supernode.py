"""This module is a device's SuperNode: it fetches messages over Flower's connection, has the
resident trainer answer each, and sends the answers.

Flower's own SuperNode asks for a message every three seconds and starts a process for each, which
imports Flower for more than a second of CPU time and loads whatever Python the server sends. This
one asks sooner while a run goes on, and loads nothing: that the app is the one whose sha256 the
device's owner was given is checked for the owner's sake. The connection is a private function of
Flower 1.41, so another release is refused until somebody has looked at it.
"""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import httpx
import psutil
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Message, RecordDict
from flwr.proto.fleet_pb2 import DeactivateNodeRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import (
    pull_and_inflate_object_from_tree,
    push_objects,
)
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.run import RunNotRunningException
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.fleet_http_connection import http_request_response
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from comigs.federation.device.trainer_socket import ask
from comigs.federation.flower.grid import PIECE_SOON, envelope, failure, opened

KNOWN = "1.41."
AUTHORITY, KEY = Path("ca.pem"), Path("key")  # in the device's folder, where this runs
# Seconds between questions for a message, just after the last one and in the end.
SOON, SELDOM = 0.25, 3.0
# Parts of the time without a message that a pause may be, and times as long as a question took that
# it must be: a server with much to do is asked less.
UNHURRIED, CONSIDERATE = 1 / 20, 5
Keys = tuple[ec.EllipticCurvePrivateKey, ec.EllipticCurvePublicKey]


def main() -> None:
    """Run `APP_SHA256 MARK TRAINER ADDRESS MEMORY` for ever.

    MARK: a file that is there while the device is online. TRAINER: the trainer's socket. ADDRESS:
    of the server. MEMORY: bytes that messages may take here.
    """
    app, mark, trainer, address = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    if not version("flwr").startswith(KNOWN):
        _end(f"flwr {version('flwr')} has not been tried with this comigs; install flwr {KNOWN}*")
    bound_memory(int(sys.argv[5]))
    # What Flower makes of a 401 is an interrupt of its own process, and nobody else sends one.
    signal.signal(signal.SIGINT, _revoked)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    private = load_ssh_private_key(KEY.read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    keys = (private, private.public_key())
    _leave(mark, address, keys)
    try:
        with http_request_response(address, False, AUTHORITY.read_bytes(), keys) as calls:
            mark.write_text(str(calls[0]))
            print(f"online as node {calls[0]}", flush=True)
            SuperNode(app, trainer, calls).work()
    # Flower exits where it is refused, and says why in its log only.
    except SystemExit as exit:
        if exit.code and not mark.exists():
            _end(
                "the server does not let this device in: its key was revoked or never "
                "registered, or another device is online with the same bundle (after a loss of "
                "the device's folder: wait a minute)"
            )
        raise
    except OtherApp as other:
        _end(
            f"the server sent an app that this device was not asked to run (sha256 "
            f"{str(other)[:12]}..., not {app[:12]}...); nothing of it was run. Ask the "
            "federation's operator why"
        )
    finally:
        mark.unlink(missing_ok=True)
    sys.exit("the connection has ended")  # Flower has logged why


class OtherApp(BaseException):
    """The server sent another app than this device's. Its text is that app's sha256.

    It is no Exception, so that Flower's connection takes its leave of the server and lets it pass.
    """


class SuperNode:
    """A SuperNode takes one message after the other from a server, and answers it."""

    def __init__(self, app: str, trainer: Path, calls: tuple[Any, ...]) -> None:
        """Ask a trainer. app: the sha256 of the app that runs must have. calls: of Flower's
        connection, the node's id first.
        """
        assert len(calls) == 8, "another Flower"
        self._app, self._trainer = app, trainer
        _, self._receive, self._send, self._get_run, self._get_fab, *pieces = calls
        self._pull, self._push, self._confirm = pieces
        self._known: set[int] = set()  # runs whose app is the right one

    def work(self) -> NoReturn:
        """Answer messages for ever."""
        answered = time.monotonic()
        while True:
            asked = time.monotonic()
            was_asked_something = self.answer_next()
            now = time.monotonic()
            if was_asked_something:
                answered = asked = now
            time.sleep(pause(now - answered, now - asked))

    def answer_next(self) -> bool:
        """Answer a message; return whether there was one. Whatever goes wrong with one message
        costs no other. Raises OtherApp.
        """
        with suppress(RunNotRunningException):
            if (received := self._receive()) is None:
                return False
            announced, tree = received
            run, name = announced.metadata.run_id, tree.object_id[:12]
            try:
                self._answer(run, tree)
                print(f"run {run}: answered {name}", flush=True)
            except RunNotRunningException:
                print(f"run {run} has ended: dropped {name}", flush=True)
            except Exception as error:
                print(f"run {run}: dropped {name}: {type(error).__name__}", flush=True)
        return True

    def _answer(self, run: int, tree: ObjectTree) -> None:
        """Answer the message whose pieces `tree` lists. Raises RunNotRunningException where its run
        has ended meanwhile, when nobody wants the answer.
        """
        # Nothing is asked of the trainer before all of the message is here and the server knows it.
        self._check_app(run)
        message = pull_and_inflate_object_from_tree(
            tree,
            partial(self._pull, run),
            partial(self._confirm, run),
            return_type=Message,
            initial_backoff=PIECE_SOON,
        )
        message.metadata.__dict__["_message_id"] = tree.object_id
        began = time.monotonic()
        reply = reply_to(message, self._trainer)
        seconds = time.monotonic() - began

        # The reply is announced with the seconds that it took, and then its pieces follow.
        reply.metadata.__dict__["_message_id"] = reply.object_id
        pieces = get_all_nested_objects(reply)
        wanted, session = self._send(reply, get_object_tree(reply), seconds)
        push: Callable[[str, bytes], None] = partial(self._push, run, session)
        push_objects(pieces, push, object_ids_to_push=wanted)

    def _check_app(self, run: int) -> None:
        """Raise OtherApp for a run of another app."""
        if run in self._known:
            return
        fab = self._get_fab(self._get_run(run).fab_hash, run)
        if (found := hashlib.sha256(fab.content).hexdigest()) != self._app:
            raise OtherApp(found)
        self._known.add(run)


def bound_memory(more: int) -> None:
    """Let this process have so many bytes more than it has now, on Linux, which can hold it to
    that: a server may send without end, and Flower's connection takes it all.
    """
    if sys.platform != "linux":
        return
    held = psutil.Process().memory_info().data
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = held + more if hard == resource.RLIM_INFINITY else min(held + more, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


def pause(quiet: float, asking: float) -> float:
    """Return the seconds to the next question.

    quiet: seconds without a message. asking: seconds that the last question took.
    """
    return min(SELDOM, max(SOON, quiet * UNHURRIED, asking * CONSIDERATE))


def reply_to(message: Message, trainer: Path) -> Message:
    """Return the trainer's answer to a message. Of an error only the type leaves the device."""
    content: RecordDict
    try:
        content = envelope(ask(trainer, opened(message.content)))
    except Exception as error:
        content = failure(type(error).__name__)
    return Message(content, reply_to=message)


def _revoked(*_: object) -> None:
    """End where the key was revoked."""
    _end("the server does not know this device's key any more: it was revoked")


def _end(message: str) -> NoReturn:
    """Say why, for the device's owner, and end at once, whatever other threads do."""
    print(message, flush=True)
    os._exit(os.EX_NOPERM)  # our last line is for people


def _leave(mark: Path, address: str, keys: Keys) -> None:
    """Give up an earlier process's place, which was killed: for a minute the server would let
    nobody else have it.
    """
    if not mark.exists():
        return
    client = FleetHttpClient.from_server_address(
        address,
        False,
        AUTHORITY.read_bytes(),
        interceptors=[NodeAuthHttpInterceptor(*keys)],
        retry_invoker=make_simple_http_retry_invoker(),
    )
    # Where the server refuses, the place was given up already, or we are refused in a moment; one
    # that does not answer in time is asked again.
    with client, suppress(httpx.HTTPError, ValueError):
        client.DeactivateNode(DeactivateNodeRequest(node_id=int(mark.read_text())))
    mark.unlink()
