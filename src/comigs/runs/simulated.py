"""These are the lines of a run with simulated devices and links, beside all others
(docs/conditions.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from comigs.runs.metrics import ClientLine, Line
from comigs.runs.record import Count, Figure, OrLeftOut


class Exchange(Line):
    """An exchange took from one moment to another, in simulated seconds since the run began."""

    kind: Literal["exchange"] = "exchange"
    began: Figure
    ended: Figure


class Attempt(ClientLine):
    """A client was asked in the round of the line, at a moment in simulated seconds.

    ended: when its answer is in, or what it did is lost. tokens: that it trained on until then.
    uploaded_bytes, downloaded_bytes: of the numbers that travelled until then. lost: why no answer
    comes of it; None where one does, however late. answers: the round of the answer that was sent,
    where that is an earlier one, which nobody had waited for.
    """

    kind: Literal["attempt"] = "attempt"
    asked: Figure
    ended: Figure
    tokens: Count
    uploaded_bytes: Count
    downloaded_bytes: Count
    lost: Annotated[str | None, OrLeftOut] = None
    answers: Annotated[Count | None, OrLeftOut] = None

    @property
    def answered_round(self) -> int:
        """The round that what was sent belongs to."""
        return self.round if self.answers is None else self.answers


def round_times(exchanges: Iterable[Exchange]) -> dict[int, tuple[float, float]]:
    """Return round -> the simulated seconds at which it began and ended.

    A round that was asked again has several exchanges.
    """
    times: dict[int, tuple[float, float]] = {}
    for exchange in exchanges:
        began, _ = times.get(exchange.round, (exchange.began, exchange.ended))
        times[exchange.round] = began, exchange.ended
    return times


def wasted_bytes(attempts: Iterable[Attempt], rounds: Iterable[int]) -> tuple[int, int]:
    """Return the bytes that a client sent and received in attempts that did not count.

    rounds: those in which it has trained, whose own lines say what travelled for them.
    """
    uploaded, downloaded, counted = 0, 0, set(rounds)
    for attempt in attempts:
        if attempt.lost is None and attempt.answered_round in counted:
            counted.remove(attempt.answered_round)
            continue
        uploaded += attempt.uploaded_bytes
        downloaded += attempt.downloaded_bytes
    return uploaded, downloaded
