"""This module is Flower's SuperNode, made to run one app only: the one whose sha256 the device's
owner was given.

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
            with connect(*args, **settings) as (node_id, receive, send, get_run, get_fab, *rest):
                assert len(rest) == 3, "another Flower"

                def checked(fab_hash: str, run_id: int) -> Any:
                    nonlocal other
                    fab = get_fab(fab_hash, run_id)
                    if (found := hashlib.sha256(fab.content).hexdigest()) != app:
                        other = found
                        raise PermissionError(found)  # Flower takes its leave of the server
                    return fab

                mark.write_text(str(node_id))
                yield node_id, receive, send, get_run, checked, *rest
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
