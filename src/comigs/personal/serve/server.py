"""`comigs serve`: the base, the models of all clients, a scheduler, and uvicorn in front of it."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from types import FrameType

import uvicorn

from comigs.bases.load import Base
from comigs.bases.usable import end_ids
from comigs.connections import Timed
from comigs.errors import UserError
from comigs.personal.serve.answers import Bounds
from comigs.personal.serve.app import BODY_SECONDS, Api, Served
from comigs.personal.serve.keys import Keys
from comigs.personal.serve.model import RowModel
from comigs.personal.serve.scheduler import Limits, Scheduler
from comigs.personal.serve.text import Vocabulary
from comigs.processes import allow_files

MAX_CONNECTIONS = 1000
FILES = MAX_CONNECTIONS + 200  # that are open: each connection is one
UNREAD = 2**17  # bytes of an answer that wait for their reader
GRACE = 10.0  # seconds in which running answers may end after SIGTERM


@dataclass(frozen=True)
class Offer:
    """What is served, and within which bounds. keys: None on the loopback alone. grace: seconds
    after SIGTERM.
    """

    base: Base
    models: dict[str, Served]
    limits: Limits
    bounds: Bounds
    keys: Keys | None = None
    grace: float = GRACE


def listen(host: str, port: int) -> socket.socket:
    """Take a port before anything is loaded: requests then wait until they can be answered. Raises
    UserError where it is taken or there is no such address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Connections inherit it: the system holds no more than this for somebody who does not read.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNREAD)
    # Likewise: the system ends those whose other end is no more.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # Two may be bound to one port, of which one can listen. A name is encoded before it is sought.
    try:
        listener.bind((host, port))
        listener.listen()
    except (OSError, UnicodeError) as error:
        listener.close()
        why = getattr(error, "strerror", None) or error
        raise UserError(f"port {port} of {host}: {why}; choose another with --port") from None
    return listener


def serve(offer: Offer, listener: socket.socket, ready: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM; running answers then have `offer.grace` seconds to end.

    ready: is called once requests are answered.
    """
    allow_files(FILES)
    # Connections inherit it: who does not read is not waited for for ever.
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        milliseconds = int(1000 * (offer.bounds.seconds + offer.grace))
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
    tokenizer = offer.base.tokenizer
    with closing(RowModel(offer.base)) as model:
        ends = end_ids(offer.base.model, tokenizer)
        scheduler = Scheduler(model, Vocabulary(tokenizer), ends, offer.limits)
        api = Api(offer.models, scheduler, offer.bounds, offer.keys)
        settings = uvicorn_settings(api, offer.grace)
        server = Server(settings, scheduler, offer.grace, ready)
        scheduler.start()
        try:
            server.run(sockets=[listener])
        finally:
            scheduler.stop(0)
            scheduler.join()


def uvicorn_settings(api: Api, grace: float) -> uvicorn.Config:
    """Return how uvicorn serves: HTTP alone, a bound on connections, no line for each request."""
    return uvicorn.Config(
        api.application(),
        http=Connection,
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=int(grace) + 5,
    )


class Connection(Timed):
    """A connection takes no longer over the head of a request than over its body."""

    seconds = BODY_SECONDS


class Server(uvicorn.Server):
    """uvicorn that ends answers within a deadline, and ends by a signal as a server should: with
    exit code 0.
    """

    def __init__(
        self, config: uvicorn.Config, scheduler: Scheduler, grace: float, ready: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self.scheduler = scheduler
        self.grace = grace
        self.ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and tell."""
        await super().startup(sockets)
        self.ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop in order at the first signal, at once at the second."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let running answers end within `grace`."""
        self.scheduler.stop(0 if self.force_exit else self.grace)
        await super().shutdown(sockets)
