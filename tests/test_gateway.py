"""The TLS gateway: what a member's device needs reaches the SuperLink as it is, and nothing else
does; whoever sends too much, too slowly or without a key costs the SuperLink nothing.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import pkgutil
import socket
import ssl
import threading
import time
from contextlib import contextmanager
from unittest.mock import patch

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from comigs.federation.security import gateway as module
from comigs.federation.security import pki
from comigs.federation.security.answers import allow_answers, largest_answer
from comigs.federation.security.door import Door
from comigs.federation.security.gateway import CALLS, MAX_OF_DEVICE, PIECE, SMALL, gateway
from tests.conftest import until
from tests.flood import signed

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


PRIVATE, PUBLIC = pki.new_device_key()
PUSH = "/v1/fleet/push-object"


@pytest.fixture(autouse=True)
def folder(tmp_path):
    """A federation's folder with one client."""
    entry = {"node_id": 1, "public_key": PUBLIC, "invited": "2026-11-01T00:00:00Z"}
    (tmp_path / "clients.json").write_text(json.dumps({"ann": entry}))
    return tmp_path


def asked(folder, link, call, key=PRIVATE):
    """What `call(client)` gives, where the client talks to a gateway before `link`."""

    async def run():
        behind = httpx.ASGITransport(link.app) if link else httpx.AsyncHTTPTransport()
        async with httpx.AsyncClient(transport=behind, base_url="http://127.0.0.1:9") as upstream:
            before = httpx.ASGITransport(gateway(upstream, folder))
            async with httpx.AsyncClient(
                transport=before, base_url="http://gateway", headers=signed(key) if key else {}
            ) as client:
                return await call(client)

    return asyncio.run(run())


def test_nothing_but_what_devices_call_is_on_the_list():
    assert set(CALLS) == {
        *("activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages"),
        *("push-messages", "get-run", "get-fab", "push-object", "pull-object"),
        "confirm-message-received",
    }


@pytest.mark.parametrize("name", CALLS)
def test_what_a_device_needs_goes_through_unchanged(folder, name):
    link = Link()
    headers = {**signed(PRIVATE), "content-type": "application/x-protobuf"}
    answer = asked(
        folder, link, lambda c: c.post(f"/v1/fleet/{name}", content=b"\x00body", headers=headers)
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
def test_nothing_else_reaches_the_superlink(folder, path, method):
    link = Link()
    raw = httpx.URL("http://gateway").copy_with(raw_path=path.encode())
    assert asked(folder, link, lambda c: c.request(method, raw)).status_code in (404, 405)
    assert not link.seen


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS"])
def test_only_post_goes_through(folder, method):
    link = Link()
    assert (
        asked(folder, link, lambda c: c.request(method, "/v1/fleet/pull-messages")).status_code
        == 405
    )
    assert not link.seen


def test_who_is_no_member_is_refused_before_a_byte_of_the_body_is_read(folder):
    link, sent = Link(), 0

    async def endless():
        nonlocal sent
        while True:
            sent += 1
            yield b"x"

    stranger, _ = pki.new_device_key()
    for key in (None, stranger):
        answer = asked(folder, link, lambda c: c.post(PUSH, content=endless()), key)
        assert answer.status_code == 401 and answer.headers["connection"] == "close"
    forged = {**signed(PRIVATE), "flwr-timestamp": "2026-01-01T00:00:00+00:00"}
    for headers in (forged, {**forged, "flwr-signature": "?"}, {**forged, "flwr-timestamp": "é"}):
        raw = {name: value.encode() for name, value in headers.items()}
        answer = asked(folder, link, lambda c, h=raw: c.post(PUSH, headers=h, content=endless()))
        assert answer.status_code == 401
    activate = "/v1/fleet/activate-node"
    assert asked(folder, link, lambda c: c.post(activate), stranger).status_code == 412
    assert not link.seen and sent <= 1  # httpx's own transport looks at the first piece


def test_who_is_invited_or_revoked_is_known_at_once(folder):
    link = Link()
    private, public = pki.new_device_key()

    async def calls(client):
        statuses = []
        for members in ({"bob": {"public_key": public}}, {}):
            statuses.append((await client.post(PUSH)).status_code)
            module.Path(folder / "new").write_text(json.dumps(members))
            (folder / "new").rename(folder / "clients.json")
        return [*statuses, (await client.post(PUSH)).status_code]

    assert asked(folder, link, calls, private) == [401, 418, 401]


def test_members_whose_file_was_away_for_a_moment_are_let_in_again(folder):
    private, public = pki.new_device_key()
    (folder / "clients.json").write_text(json.dumps({"bob": {"public_key": public}}))

    async def calls(client):
        statuses = [(await client.post(PUSH)).status_code]
        (folder / "clients.json").rename(folder / "away")
        statuses.append((await client.post(PUSH)).status_code)
        (folder / "away").rename(folder / "clients.json")
        return [*statuses, (await client.post(PUSH)).status_code]

    first, without, again = asked(folder, Link(), calls, private)
    assert (first, without, again) == (418, 401, 418)


@pytest.mark.parametrize(("call", "most"), [("push-object", PIECE), ("push-messages", SMALL)])
def test_a_body_that_claims_too_great_a_length_is_refused(folder, call, most):
    link = Link()
    path = f"/v1/fleet/{call}"
    assert asked(folder, link, lambda c: c.post(path, content=b"x" * most)).status_code == 418
    link.seen.clear()
    answer = asked(folder, link, lambda c: c.post(path, content=b"x" * (most + 1)))
    assert answer.status_code == 413 and not link.seen


def test_a_body_that_grows_too_large_is_cut_off(folder):
    link, sent = Link(), 0

    async def endless():
        nonlocal sent
        while True:
            sent += 2**20
            yield b"x" * 2**20

    assert asked(folder, link, lambda c: c.post(PUSH, content=endless())).status_code == 413
    assert not link.seen and sent <= PIECE + 2 * 2**20


def test_a_message_grows_no_larger_than_the_runs_shapes_allow(folder):
    """Its pieces are counted from its announcement on; each may come twice, over a bad line."""
    link = Link()
    allow_answers(folder, 3 * PIECE)
    allow_answers(folder, PIECE)
    assert largest_answer(folder) == 3 * PIECE

    async def calls(client):
        statuses = []
        for _ in range(2):
            statuses.append((await client.post("/v1/fleet/push-messages")).status_code)
            for _ in range(8):
                statuses.append((await client.post(PUSH, content=b"x" * PIECE)).status_code)
        return statuses

    assert asked(folder, link, calls) == 2 * [418, *(7 * [418]), 413]


class Slow:
    """A body whose last byte waits until it is let go."""

    def __init__(self):
        self.begun, self.go = asyncio.Event(), asyncio.Event()

    async def body(self):
        yield b"x" * 1000
        self.begun.set()
        await self.go.wait()
        yield b"x"


def asked_over_sockets(folder, link, calls):
    """As `asked`, with `calls(client)` over a socket, as bodies then come piece by piece."""

    async def run():
        upstream = httpx.AsyncClient(transport=httpx.ASGITransport(link.app), base_url="http://l")
        config = module.uvicorn.Config(
            gateway(upstream, folder), http=Door, ws="none", port=0, log_level="warning"
        )
        server = module.uvicorn.Server(config)
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}",
            headers=signed(PRIVATE),
            limits=httpx.Limits(max_connections=None),
        ) as client:
            try:
                return await calls(client, port)
            finally:
                server.should_exit = True
                await serving

    return asyncio.run(run())


def test_the_superlink_hears_of_a_body_when_all_of_it_is_there(folder):
    link = Link()

    async def calls(client, port):
        slow = Slow()
        waiting = asyncio.create_task(client.post(PUSH, content=slow.body()))
        await slow.begun.wait()
        assert (await client.post(PUSH, content=b"fast")).status_code == 418
        seen = [len(body) for _, _, _, body in link.seen]
        slow.go.set()
        assert (await waiting).status_code == 418
        return seen, link.seen[1][2]["content-length"], len(link.seen[1][3])

    assert asked_over_sockets(folder, link, calls) == ([4], "1001", 1001)


def test_a_device_has_few_requests_at_a_time(folder):
    """One more is a 503, after which a device tries again; one that has left makes room."""
    link = Link()

    async def calls(client, port):
        slow = [Slow() for _ in range(MAX_OF_DEVICE)]
        waiting = [asyncio.create_task(client.post(PUSH, content=s.body())) for s in slow]
        for one in slow:
            await one.begun.wait()
        await asyncio.sleep(0.1)
        statuses = [(await client.post(PUSH)).status_code]
        waiting[0].cancel()
        await asyncio.sleep(0.2)
        statuses.append((await client.post(PUSH)).status_code)
        for one in slow:
            one.go.set()
        await asyncio.gather(*waiting[1:])
        return [*statuses, (await client.post(PUSH)).status_code]

    assert asked_over_sockets(folder, link, calls) == [503, 418, 418]


def test_a_body_that_takes_too_long_is_given_up(folder):
    link = Link()

    async def calls(client, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        headers = {"host": "here", "content-length": "100", **signed(PRIVATE)}
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(f"POST {PUSH} HTTP/1.1\r\n{head}\r\nx".encode())
        answer = await asyncio.wait_for(reader.read(), 5)
        writer.close()
        return answer.split(b"\r\n")[0]

    with patch.object(module, "BODY_SECONDS", 0.2):
        said = asked_over_sockets(folder, link, calls)
    assert said == b"HTTP/1.1 503 Service Unavailable" and not link.seen


def test_connections_that_ask_for_nothing_are_closed_and_of_one_address_there_are_few(folder):
    link = Link()

    async def left(reader):
        return await asyncio.wait_for(reader.read(), 5) == b""

    async def calls(client, port):
        silent, writer = await asyncio.open_connection("127.0.0.1", port)
        slow, other = await asyncio.open_connection("127.0.0.1", port)
        other.write(b"POST /v1/fleet/push-object HTTP/1.1\r\nx: ")
        closed = [await left(silent), await left(slow)]
        with patch("comigs.federation.security.door.MAX_OF_ADDRESS", 0):
            refused, third = await asyncio.open_connection("127.0.0.1", port)
            closed.append(await left(refused))
        elsewhere = (await client.post(PUSH)).status_code
        for each in (writer, other, third):
            each.close()
        return closed, elsewhere

    with patch.object(Door, "seconds", 0.3):
        assert asked_over_sockets(folder, link, calls) == ([True, True, True], 418)
    assert not Door.there


def test_a_request_that_takes_long_is_not_taken_for_an_idle_connection(folder):
    link = Link()

    async def calls(client, port):
        slow = Slow()
        waiting = asyncio.create_task(client.post(PUSH, content=slow.body()))
        await asyncio.sleep(0.5)
        slow.go.set()
        return (await waiting).status_code

    with patch.object(Door, "seconds", 0.1):
        assert asked_over_sockets(folder, link, calls) == 418


@contextmanager
def gateway_with_tls(folder, link):
    """A gateway in a thread as it is in earnest, and its port."""
    authority, key = pki.new_authority("fed")
    certificate, own = pki.new_server_certificate(authority, key, ("127.0.0.1",))
    for name, text in (("ca.pem", authority), ("server.pem", certificate), ("server.key", own)):
        (folder / name).write_text(text)
    upstream = httpx.AsyncClient(transport=httpx.ASGITransport(link.app), base_url="http://l")
    config = module.uvicorn.Config(
        gateway(upstream, folder),
        http=Door,
        loop="comigs.federation.security.door:new_loop",
        ws="none",
        port=0,
        ssl_certfile=folder / "server.pem",
        ssl_keyfile=folder / "server.key",
        log_level="warning",
    )
    server = module.uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)


@pytest.mark.parametrize("kind", ["asyncio:asyncio_loop_factory", "auto:auto_loop_factory"])
def test_a_connection_that_does_not_finish_tls_is_closed(folder, kind):
    """Nobody counts it before, and an event loop would wait for it for a minute."""
    factory = pkgutil.resolve_name(f"uvicorn.loops.{kind}")
    with (
        patch("comigs.federation.security.door.auto_loop_factory", factory),
        patch("comigs.federation.security.door.TLS_SECONDS", 0.5),
        gateway_with_tls(folder, Link()) as port,
        socket.create_connection(("127.0.0.1", port), timeout=10) as silent,
        httpx.Client(verify=ssl.create_default_context(cafile=folder / "ca.pem")) as client,
    ):
        answer = client.post(f"https://127.0.0.1:{port}{PUSH}", headers=signed(PRIVATE))
        assert answer.status_code == 418
        began = time.monotonic()
        assert silent.recv(1) == b"" and time.monotonic() - began < 5
        again = client.post(f"https://127.0.0.1:{port}{PUSH}", headers=signed(PRIVATE))
        assert again.status_code == 418


def test_a_superlink_that_is_away_is_a_503_which_devices_retry(folder):
    answer = asked(folder, None, lambda c: c.post("/v1/fleet/pull-messages"))
    assert answer.status_code == http.client.SERVICE_UNAVAILABLE


def test_a_disk_that_takes_nothing_is_a_503_too(folder):
    with patch.object(module, "SpooledTemporaryFile", side_effect=OSError):
        assert asked(folder, Link(), lambda c: c.post(PUSH)).status_code == 503
