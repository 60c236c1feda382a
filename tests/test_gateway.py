"""The TLS gateway: what a device needs reaches the SuperLink as it is, and nothing else does."""

from __future__ import annotations

import asyncio
import http.client

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from comigs.federation.security.gateway import CALLS, gateway

OUTSIDE = (  # what the SuperLink has beside what devices need
    "/",
    "/docs",
    "/openapi.json",
    "/health",
    "/v1/control/list-runs",
    "/v1/control/start-run",
    "/v1/runtime/acquire-task",
    "/v1/fleet",
    "/v1/fleet/",
    "/v1/fleet/register-node",
    "/v1/fleet/unregister-node",
    "/v1/fleet/pull-messages/x",
    "/v1/fleet/../control/list-runs",
    "/v1/fleet/%2e%2e/control/list-runs",
    "/v1/fleet/..%2fcontrol%2flist-runs",
    "//v1/fleet/pull-messages",
    "/v1/fleet/pull-messages/../../control/list-runs",
    "/V1/FLEET/PULL-MESSAGES",
)


class Link:
    """Stands in for the SuperLink: keeps what reaches it."""

    def __init__(self):
        self.seen = []
        self.pieces = asyncio.Queue()
        self.app = Starlette(
            routes=[Route("/{path:path}", self.answer, methods=["GET", "POST", "PUT", "DELETE"])]
        )

    async def answer(self, request):
        body = b""
        async for piece in request.stream():
            body += piece
            await self.pieces.put(piece)
        self.seen.append((request.method, request.scope["path"], dict(request.headers), body))
        return Response(b"answer " + body[:5], 418, {"x-of-the-link": "yes"})


def asked(link, call, max_body=1000):
    """What `call(client)` gives, where the client talks to a gateway before `link`."""

    async def run():
        behind = httpx.ASGITransport(link.app) if link else httpx.AsyncHTTPTransport()
        async with httpx.AsyncClient(transport=behind, base_url="http://127.0.0.1:9") as upstream:
            before = httpx.ASGITransport(gateway(upstream, max_body))
            async with httpx.AsyncClient(transport=before, base_url="http://gateway") as client:
                return await call(client)

    return asyncio.run(run())


@pytest.mark.parametrize("name", CALLS)
def test_what_a_device_needs_goes_through_unchanged(name):
    link = Link()
    headers = {"flwr-signature": "signed", "content-type": "application/x-protobuf"}
    answer = asked(
        link, lambda c: c.post(f"/v1/fleet/{name}", content=b"\x00body", headers=headers)
    )
    ((method, path, got, body),) = link.seen
    assert (method, path, body) == ("POST", f"/v1/fleet/{name}", b"\x00body")
    assert headers.items() <= got.items() and got["content-length"] == "5"
    assert (answer.status_code, answer.content, answer.headers["x-of-the-link"]) == (
        418,
        b"answer \x00body",
        "yes",
    )


@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_nothing_else_reaches_the_superlink(path, method):
    link = Link()
    raw = httpx.URL("http://gateway").copy_with(raw_path=path.encode())
    assert asked(link, lambda c: c.request(method, raw)).status_code in (404, 405)
    assert not link.seen


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS"])
def test_only_post_goes_through(method):
    link = Link()
    assert asked(link, lambda c: c.request(method, "/v1/fleet/pull-messages")).status_code == 405
    assert not link.seen


def test_a_body_that_claims_too_great_a_length_is_refused():
    link = Link()
    answer = asked(link, lambda c: c.post("/v1/fleet/push-object", content=b"x" * 1001))
    assert answer.status_code == 413 and not link.seen


def test_a_body_that_grows_too_large_is_cut_off():
    link, sent = Link(), 0

    async def endless():
        nonlocal sent
        for _ in range(100):
            sent += 400
            yield b"x" * 400

    assert (
        asked(link, lambda c: c.post("/v1/fleet/push-object", content=endless())).status_code == 413
    )
    assert not link.seen


def test_a_body_passes_as_it_comes():
    link, statuses = Link(), []
    pieces = [b"0", b"1", b"2"]

    async def receive():
        if not pieces:
            await asyncio.Event().wait()  # for a disconnect, which never comes
        if len(pieces) < 3:  # the one before is there already, before this one is sent
            assert await asyncio.wait_for(link.pieces.get(), 5) == bytes(
                str(2 - len(pieces)), "ascii"
            )
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def send(message):
        statuses.append(message.get("status"))

    async def run():
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/fleet/push-object",
            "headers": [],
            "query_string": b"",
        }
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(link.app), base_url="http://link"
        ) as upstream:
            await gateway(upstream)(scope, receive, send)

    asyncio.run(run())
    assert statuses[0] == 418 and link.seen[0][3] == b"012"


def test_a_superlink_that_is_away_is_a_503_which_devices_retry():
    assert (
        asked(None, lambda c: c.post("/v1/fleet/pull-messages")).status_code
        == http.client.SERVICE_UNAVAILABLE
    )
