"""The gateway is the only port that devices reach. It speaks TLS, and behind it is nothing but what
a device needs of the SuperLink.

The SuperLink itself would let anyone who reaches it start a run, which is to run code on every
device, so it listens on the loopback alone. Bodies are passed on as they come, and never held
whole.
"""

from __future__ import annotations

import asyncio
import ssl
import sys
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

# All that a registered device calls; a device cannot register itself.
CALLS = (
    *("activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages", "push-messages"),
    *("get-run", "get-fab", "push-object", "pull-object", "confirm-message-received"),
)
MAX_BODY = 16 * 2**20  # bytes; Flower cuts what it sends into pieces of 5 MiB
MAX_CONNECTIONS = 1000
BODY_SECONDS = 600  # for one request's body to arrive, over a slow line
UPSTREAM_SECONDS = 120  # for the SuperLink to answer
OF_THIS_HOP = {  # headers that are not passed on
    *("host", "connection", "keep-alive", "transfer-encoding"),
    *("te", "trailer", "upgrade", "date", "server"),
}


class TooLarge(Exception):
    """A body is above the limit."""


def gateway(upstream: httpx.AsyncClient, max_body: int = MAX_BODY) -> Starlette:
    """Return the web application. upstream: a client whose base address is the SuperLink."""

    async def pass_on(request: Request) -> Response:
        # Whatever does not come through is answered with a code after which a device tries again.
        try:
            if int(request.headers.get("content-length", 0)) > max_body:
                raise TooLarge
            async with asyncio.timeout(BODY_SECONDS):
                asked = upstream.build_request(
                    "POST",
                    request.url.path,
                    headers=_headers(request.headers.items()),
                    content=_body(request, max_body),
                )
                answer = await upstream.send(asked, stream=True)
        except TooLarge:
            return Response("too large", 413)
        except TimeoutError:
            return Response("too slow", 408)
        except httpx.HTTPError:
            return Response("the SuperLink does not answer", 503)
        headers, close = dict(_headers(answer.headers.items())), BackgroundTask(answer.aclose)
        return StreamingResponse(answer.aiter_raw(), answer.status_code, headers, background=close)

    return Starlette(
        routes=[Route(f"/v1/fleet/{call}", pass_on, methods=["POST"]) for call in CALLS]
    )


async def _body(request: Request, max_body: int) -> AsyncIterator[bytes]:
    size = 0
    async for piece in request.stream():
        size += len(piece)
        if size > max_body:
            raise TooLarge
        yield piece


def _headers(items: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(name, value) for name, value in items if name.lower() not in OF_THIS_HOP]


def main() -> None:
    """Serve `FEDERATION_FOLDER LISTEN PORT INNER_PORT` until stopped."""
    folder, listen, port, inner = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    # The SuperLink's certificate is the federation's own, and no proxy is between it and us.
    upstream = httpx.AsyncClient(
        base_url=f"https://127.0.0.1:{inner}",
        verify=ssl.create_default_context(cafile=folder / "ca.pem"),
        timeout=UPSTREAM_SECONDS,
        trust_env=False,
        limits=httpx.Limits(max_connections=MAX_CONNECTIONS),
    )
    uvicorn.run(
        gateway(upstream),
        host=listen,
        port=port,
        ssl_certfile=folder / "server.pem",
        ssl_keyfile=folder / "server.key",
        limit_concurrency=MAX_CONNECTIONS,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=3,
    )
