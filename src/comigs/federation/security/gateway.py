"""The gateway is the only port that devices reach. It speaks TLS, and behind it is nothing but what
a device needs of the SuperLink.

The SuperLink itself would let anyone who reaches it start a run, which is to run code on every
device, so it listens on the loopback alone. It reads whole bodies into memory before it asks who
sent them, so that is asked here, of the head; and a body is here in whole, on the disk, before the
SuperLink hears of it. A few are with it at a time, and none of them waits for a slow device.
"""

from __future__ import annotations

import asyncio
import ssl
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import ExitStack
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import IO

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from comigs.federation.security.answers import largest_answer
from comigs.federation.security.door import Door
from comigs.federation.security.members import Members
from comigs.processes import allow_files

# All that a registered device calls; a device cannot register itself.
CALLS = (
    *("activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages", "push-messages"),
    *("get-run", "get-fab", "push-object", "pull-object", "confirm-message-received"),
)
PIECE = 6 * 2**20  # bytes of a push-object; Flower cuts what it sends into pieces of 5 MiB
SMALL = 2**16  # bytes of every other call
MAX_OF_DEVICE = 8  # requests of a device at a time; a SuperNode has half of that
MAX_UPSTREAM = 8  # requests to the SuperLink at a time
BODY_SECONDS = 600  # for one request's body to arrive, over a slow line
UPSTREAM_SECONDS = 120  # for the SuperLink to answer
READ = 2**16  # bytes that are read at a time
FILES = 4096  # open files: connections, and bodies on the disk
OF_THIS_HOP = {  # headers that are not passed on
    *("host", "connection", "keep-alive", "transfer-encoding"),
    *("te", "trailer", "upgrade", "date", "server", "content-length"),
}


class Refused(Exception):
    """A request is not passed on. `answer` says why to the device."""

    def __init__(self, answer: Response) -> None:
        super().__init__()
        self.answer = answer


class PassOn:
    """This passes a member's requests on to the SuperLink, as an ASGI application."""

    def __init__(self, upstream: httpx.AsyncClient, folder: Path) -> None:
        self._upstream, self._folder = upstream, folder
        self._members = Members(folder / "clients.json")
        self._busy: Counter[str] = Counter()
        self._room: dict[str, int] = {}  # bytes that are left of the message a client is sending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request = Request(scope, receive)
        # A body, its answer and the client's place are held until all is sent, and no longer.
        with ExitStack() as held:
            try:
                client = self._admit(request, held)
                answer = await self._answer(request, client, held)
            except ClientDisconnect:
                return
            except Refused as refused:
                answer = refused.answer
            except OSError:
                answer = refusal("the server's disk takes nothing", 503).answer
            await answer(scope, receive, send)

    def _admit(self, request: Request, held: ExitStack) -> str:
        """Return whose request this is, and give it a place. Raises Refused."""
        client = self._members.sender(request.headers)
        if client is None:
            # The SuperLink's own codes: by the one a device knows that it was never let in.
            code = 412 if request.url.path.endswith("/activate-node") else 401
            raise refusal("no key of a client here", code)
        if self._busy[client] >= MAX_OF_DEVICE:
            raise refusal("too many requests of one device at a time", 503)
        self._busy[client] += 1
        held.callback(self._busy.subtract, [client])
        return client

    async def _answer(self, request: Request, client: str, held: ExitStack) -> Response:
        """Return the SuperLink's answer. Raises Refused."""
        # What does not come through for now gets a code after which a device tries again: 503.
        call = request.url.path.rpartition("/")[2]
        body = held.enter_context(self._spool())
        try:
            async with asyncio.timeout(BODY_SECONDS):
                size = await _take_in(request, PIECE if call == "push-object" else SMALL, body)
        except TimeoutError:
            raise refusal("too slow", 503) from None
        self._count(call, client, size)

        # The SuperLink is done with a request before its answer begins to leave.
        headers = [*_headers(request.headers.items()), ("content-length", str(size))]
        kept = held.enter_context(self._spool())
        asked = self._upstream.stream(
            "POST", request.url.path, headers=headers, content=_pieces(body)
        )
        try:
            async with asked as answer:
                async for piece in answer.aiter_raw():
                    kept.write(piece)
        except httpx.HTTPError:
            raise refusal("the SuperLink does not answer", 503) from None
        told = dict(_headers(answer.headers.items())) | {"content-length": str(kept.tell())}
        return StreamingResponse(_pieces(kept), answer.status_code, told)

    def _count(self, call: str, client: str, size: int) -> None:
        """Take note of how much a message has grown. Raises Refused where that is too much."""
        # A message is announced first, and then its pieces come, perhaps twice over a bad line.
        if call == "push-messages" or client not in self._room:
            self._room[client] = 2 * largest_answer(self._folder) + PIECE
        if call == "push-object":
            self._room[client] -= size
            if self._room[client] < 0:
                raise refusal("larger than any answer of a run here", 413)

    def _spool(self) -> SpooledTemporaryFile[bytes]:
        return SpooledTemporaryFile(SMALL, dir=str(self._folder))


def gateway(upstream: httpx.AsyncClient, folder: Path) -> Starlette:
    """Return the web application. upstream: a client whose base address is the SuperLink.
    folder: the federation's.
    """
    pass_on = PassOn(upstream, folder)
    return Starlette(
        routes=[Route(f"/v1/fleet/{call}", pass_on, methods=["POST"]) for call in CALLS]
    )


def refusal(why: str, status: int) -> Refused:
    """Return a refusal; the connection is closed after it, for its sender may be sending still."""
    return Refused(JSONResponse({"detail": why}, status, {"connection": "close"}))


async def _take_in(request: Request, most: int, body: IO[bytes]) -> int:
    """Write a request's body to a file, and return its length. Raises Refused where it is above
    the limit.
    """
    size = int(request.headers.get("content-length", 0))
    if size <= most:
        size = 0
        async for piece in request.stream():
            size += len(piece)
            if size > most:
                break
            body.write(piece)
    if size > most:
        raise refusal("too large", 413)
    return size


async def _pieces(file: IO[bytes]) -> AsyncIterator[bytes]:
    file.seek(0)
    while piece := file.read(READ):
        yield piece


def _headers(items: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(name, value) for name, value in items if name.lower() not in OF_THIS_HOP]


def main() -> None:
    """Serve `FEDERATION_FOLDER LISTEN PORT INNER_PORT` until stopped."""
    folder, listen, port, inner = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    # a connection is a file, and so is a body
    allow_files(FILES)
    # The SuperLink's certificate is the federation's own, and no proxy is between it and us.
    upstream = httpx.AsyncClient(
        base_url=f"https://127.0.0.1:{inner}",
        verify=ssl.create_default_context(cafile=folder / "ca.pem"),
        timeout=UPSTREAM_SECONDS,
        trust_env=False,
        limits=httpx.Limits(max_connections=MAX_UPSTREAM),
    )
    uvicorn.run(
        gateway(upstream, folder),
        host=listen,
        port=port,
        ssl_certfile=folder / "server.pem",
        ssl_keyfile=folder / "server.key",
        http=Door,
        loop="comigs.federation.security.door:new_loop",
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=3,
    )
