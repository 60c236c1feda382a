"""A door is what a connection comes to before any request of it is read: it counts who is there,
and shows out who asks for nothing.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from functools import partial
from typing import ClassVar

from uvicorn.loops.auto import auto_loop_factory

from comigs.connections import Timed

MAX_CONNECTIONS = 1000  # in all
MAX_OF_ADDRESS = 256  # of one address, behind which many devices may be
HEAD_SECONDS = 20  # for the head of a request to arrive
TLS_SECONDS = 10  # for a connection to be one of TLS; until then it is at no door


class Door(Timed):
    """A door is uvicorn's HTTP protocol with bounds on connections."""

    seconds = HEAD_SECONDS
    there: ClassVar[Counter[str]] = Counter()  # connections of each address

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Let a connection in, or close it where there are too many."""
        super().connection_made(transport)
        self._address = (self.client or ("", 0))[0]
        self.there[self._address] += 1
        # It is closed in TLS's own way: whoever sees a torn connection takes TLS to be broken.
        if self.there.total() > MAX_CONNECTIONS or self.there[self._address] > MAX_OF_ADDRESS:
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Count a connection out."""
        self.there[self._address] -= 1
        if not self.there[self._address]:
            del self.there[self._address]
        super().connection_lost(exc)


def new_loop() -> asyncio.AbstractEventLoop:
    """Return an event loop as uvicorn makes it, whose servers wait for TLS_SECONDS. Both kinds of
    loop would wait for a minute.
    """
    loop = auto_loop_factory()()
    create = partial(loop.create_server, ssl_handshake_timeout=TLS_SECONDS)
    loop.create_server = create  # type: ignore[method-assign]
    return loop
