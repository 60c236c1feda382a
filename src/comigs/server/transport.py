"""What a dispatcher needs of whatever carries its messages, and of the clock that it waits by.

There is a real pair (Flower's grid, this machine's clock) and a simulated one
(engines/conditions/network.py), which is both in one. No torch: a device imports this.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

GONE = "gone"


@dataclass(frozen=True)
class Failure:
    """A failure says that no answer will come to a message.

    reason: why, in a few words that are ours.
    """

    reason: str


class Transport(Protocol):
    """A transport carries messages to nodes. What a message is, whoever asks and it agree on."""

    def online(self, nodes: Collection[int]) -> Mapping[int, str]:
        """Return those of these nodes that can be reached, each with when it (re)started."""

    def push(self, node: int, message: Any, life: float) -> str | None:
        """Send a message to a node; return its id, or None where it could not be sent.

        life: seconds after which nobody waits for its answer.
        """

    def pull(self, ids: Iterable[str]) -> Mapping[str, Any]:
        """Return what has come in for these messages, by message: an answer or a Failure."""


class Clock(Protocol):
    """A clock is what an exchange measures its seconds by."""

    def now(self) -> float:
        """Return the seconds since some moment."""

    def wait(self, seconds: float, until: float) -> None:
        """Let time pass before somebody looks for answers again.

        seconds: a look does no harm after so many. until: something changes by then without an
        answer, in the clock's own time.
        """


class RealClock:
    """The real clock is this machine's."""

    def now(self) -> float:
        """Return the seconds since some moment."""
        return time.monotonic()

    def wait(self, seconds: float, until: float) -> None:
        """Wait for so many seconds."""
        time.sleep(seconds)
