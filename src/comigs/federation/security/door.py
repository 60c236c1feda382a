"""A door is what a connection comes to before any request of it is read: it counts who is there,
and shows out who asks for nothing.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any, ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS = 1000  # in all
MAX_OF_ADDRESS = 256  # of one address, behind which many devices may be
HEAD_SECONDS = 20  # for the head of a request to arrive


class Door(H11Protocol):
    """A door is uvicorn's HTTP protocol with bounds on connections.

    h11 bounds the head of a request, where httptools takes headers without end.
    """

    there: ClassVar[Counter[str]] = Counter()  # connections of each address

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Let a connection in, or close it where there are too many."""
        super().connection_made(transport)
        self._address, self._cycle = (self.client or ("", 0))[0], None
        self.there[self._address] += 1
        self._timer = self.loop.call_later(HEAD_SECONDS, self._look)
        # It is closed in TLS's own way: whoever sees a torn connection takes TLS to be broken.
        if self.there.total() > MAX_CONNECTIONS or self.there[self._address] > MAX_OF_ADDRESS:
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Count a connection out."""
        self._timer.cancel()
        self.there[self._address] -= 1
        if not self.there[self._address]:
            del self.there[self._address]
        super().connection_lost(exc)

    def _look(self) -> None:
        """Close the connection where no request has come since the last look."""
        cycle: Any = self.cycle
        if cycle is self._cycle and (cycle is None or cycle.response_complete):
            self.transport.close()
            return
        self._cycle = cycle
        self._timer = self.loop.call_later(HEAD_SECONDS, self._look)
