"""This module is Flower's SuperNode, made to run one app only, the one whose sha256 the device's
owner was given, and to answer each message also after a run has ended in the midst of one.

By itself a SuperNode runs whatever Python the server sends. This wraps a private function of Flower
1.41 (its command has no such option), so another release is refused until somebody has looked at
it.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import httpx
from flwr.proto.fleet_pb2 import DeactivateNodeRequest
from flwr.supercore.run import RunNotRunningException
from flwr.supernode import start_client_internal as flower
from flwr.supernode.cli.flower_supernode import flower_supernode
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

KNOWN = "1.41."
connect = flower._init_connection


def main() -> None:
    """Run `APP_SHA256 MARK ARGUMENTS...`: flower-supernode with these arguments.

    MARK: a file that is there while the device is online.
    """
    app, mark = sys.argv[1], Path(sys.argv[2])
    sys.argv[:3] = ["flower-supernode"]
    if not version("flwr").startswith(KNOWN):
        _end(f"flwr {version('flwr')} has not been tried with this comigs; install flwr {KNOWN}*")
    flower._init_connection = pinned(app, mark)
    flower_supernode()
    os._exit(1)  # its loop has ended, but a thread of its own would keep it half alive


def pinned(app: str, mark: Path) -> Callable[..., Any]:
    """Return Flower's `_init_connection`, whose connection hands out this app only, and ends the
    process where the server sends any other.
    """

    @contextmanager
    def connection(*args: Any, **settings: Any) -> Iterator[tuple[Any, ...]]:
        signal.signal(signal.SIGINT, _revoked)
        _leave(mark, settings)
        other = ""
        try:
            with connect(*args, **settings) as calls:
                assert len(calls) == 8, "another Flower"
                node_id, receive, send, get_run, get_fab, pull, push, confirm = calls

                def checked(fab_hash: str, run_id: int) -> Any:
                    nonlocal other
                    fab = get_fab(fab_hash, run_id)
                    if (found := hashlib.sha256(fab.content).hexdigest()) != app:
                        other = found
                        raise PermissionError(found)  # Flower takes its leave of the server
                    return fab

                mark.write_text(str(node_id))
                pull, confirm = whole_or_failed(pull), whatever_comes(confirm)
                yield node_id, receive, send, get_run, checked, pull, push, confirm
        # Flower exits where it is refused, and says why in its log only.
        except SystemExit:
            if not mark.exists():
                _end(
                    "the server does not let this device in: its key was revoked or never "
                    "registered, or another device is online with the same bundle (after a loss of "
                    "the device's folder: wait a minute)"
                )
            raise
        finally:
            mark.unlink(missing_ok=True)
            if other:
                _end(
                    f"the server sent an app that this device was not asked to run (sha256 "
                    f"{other[:12]}..., not {app[:12]}...); nothing of it was run. Ask the "
                    "federation's operator why"
                )

    return connection


# Flower lets an app begin with a message before all of it is there and confirmed. Where the run
# ends in between, Flower 1.41 drops the message by an exception that passes its own clearing up,
# and does not wait for what the app replies. That reply is then taken for the one to the next
# message, whose own waits here for one more message: a server waits for it until its deadline.


def whole_or_failed(pull: Callable[[int, str], bytes]) -> Callable[[int, str], bytes]:
    """Return `pull`, after which Flower clears up also where the message's run has ended:
    nothing can have answered a message that is not whole.
    """

    def pulled(run_id: int, object_id: str) -> bytes:
        try:
            return pull(run_id, object_id)
        except RunNotRunningException:
            raise ConnectionAbortedError("its run has ended") from None

    return pulled


def whatever_comes(confirm: Callable[[int, str], None]) -> Callable[[int, str], None]:
    """Return `confirm`, after which Flower waits for the reply whatever the server says: a message
    that is whole is answered, and where nobody wants the reply any more Flower drops it.
    """

    def confirmed(run_id: int, message_id: str) -> None:
        with suppress(Exception, RunNotRunningException):
            confirm(run_id, message_id)

    return confirmed


def _revoked(*_: object) -> None:
    """End where the key was revoked: what Flower makes of a 401 is a SIGINT to itself, and nobody
    else sends one.
    """
    _end("the server does not know this device's key any more: it was revoked")


def _end(message: str) -> NoReturn:
    """Say why, for the device's owner, and end at once, whatever other threads do."""
    print(message, flush=True)
    os._exit(os.EX_NOPERM)  # our last line is for people


def _leave(mark: Path, settings: dict[str, Any]) -> None:
    """Give up an earlier process's place, which was killed: for a minute the server would let
    nobody else have it.
    """
    if not mark.exists():
        return
    client = FleetHttpClient.from_server_address(
        settings["server_address"],
        settings["insecure"],
        settings["root_certificates"],
        interceptors=[NodeAuthHttpInterceptor(*settings["authentication_keys"])],
    )
    # Where the server refuses, the place was given up already, or we are refused in a moment.
    with client, suppress(httpx.HTTPError, ValueError):
        client.DeactivateNode(DeactivateNodeRequest(node_id=int(mark.read_text())))
    mark.unlink()
