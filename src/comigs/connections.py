"""This module is what our web servers have in common: connections that ask for nothing end."""

from __future__ import annotations

import asyncio
from typing import ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol


class Timed(H11Protocol):
    """A timed connection is uvicorn's, with so many seconds for the head of a request to be there,
    from its beginning and from its last answer on. uvicorn itself waits for ever.

    h11 bounds the head of a request, where httptools takes headers without end.
    """

    seconds: ClassVar[float]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait."""
        super().connection_made(transport)
        self._timer = self.loop.call_later(self.seconds, self._look)

    def on_response_complete(self) -> None:
        """Begin to wait anew."""
        self._timer.cancel()
        self._timer = self.loop.call_later(self.seconds, self._look)
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._timer.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        """Close the connection where no request is being answered."""
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
