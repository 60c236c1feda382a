"""What scores of canaries come to: who can be told from whom, how exposed, and the bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from comigs.experiments.audit.bound import epsilon_at_least

# Of the canaries, those that are guessed at: whoever is sure of few abstains from the rest. Each is
# tried at its part of the level, so that the best of them may be taken.
SHARES = (1.0, 0.5, 0.25)
LEVEL = 0.05


@dataclass(frozen=True)
class Score:
    """A score is what a model makes of a canary: its nats, less those of the base.

    copies: times that the canary is in its client's train text, where it is in.
    """

    client: str
    copies: int
    member: bool
    nats: float


@dataclass(frozen=True)
class Promise:
    """A promise is the differential privacy of one document, or of one client."""

    epsilon: float
    delta: float

    def of_copies(self, copies: int) -> Promise | None:
        """Return what it promises of so many copies of a document together; None for nothing.

        Each copy adds epsilon, and its delta counts e^epsilon times that of the copy before.
        """
        most = max(0, copies - 1) * self.epsilon + math.log(self.delta)
        if most >= 0:
            return None
        delta = math.fsum(self.delta * math.exp(self.epsilon * step) for step in range(copies))
        return Promise(copies * self.epsilon, delta) if delta < 1 else None


@dataclass(frozen=True)
class Row:
    """A row says what can be told from one kind of model of canaries with so many copies.

    told_apart: the probability that a canary that was in scores lower than one that was not (1/2:
    by chance). rank: of the former among the latter of its client, the median, in (0, 1]; exposure:
    likewise, log2(n) - log2(rank of n) of 1802.08232. correct of guesses: of the share of canaries
    that gave the bound. epsilon: the lower bound on the epsilon of all copies together at this
    delta, with 95 % confidence. promised: the epsilon that the run promises of just that; None: it
    promises nothing.
    """

    seen: str
    copies: int
    canaries: int
    members: int
    told_apart: float
    rank: float
    exposure: float
    guesses: int
    correct: int
    epsilon: float
    delta: float
    promised: float | None = None

    @property
    def exceeds(self) -> bool:
        """Whether the guesses refute what the run promises."""
        return self.promised is not None and self.epsilon > self.promised

    def as_json(self) -> dict[str, Any]:
        """Return the row as plain values."""
        return asdict(self) | {"exceeds": self.exceeds}


def rows(
    seen: str,
    scores: Sequence[Score],
    delta: float,
    promised: Callable[[int], Promise | None] = lambda copies: None,
) -> list[Row]:
    """Return a row for each number of copies. seen: what the guesses are made from.

    promised: what the run promises of so many copies. delta: of a bound that no promise is held
    against.
    """
    found = []
    for copies in sorted({score.copies for score in scores}):
        of_copies = [score for score in scores if score.copies == copies]
        outside = [score for score in scores if not score.member]
        promise = promised(copies)
        at = promise.delta if promise is not None else delta
        row = _row(seen, copies, of_copies, outside, at)
        found.append(replace(row, promised=promise.epsilon if promise is not None else None))
    return found


def _row(
    seen: str, copies: int, scores: Sequence[Score], outside: Sequence[Score], delta: float
) -> Row:
    # A made-up text that was nowhere is a fair rival of any other, whatever its copies would be.
    inside = [score for score in scores if score.member]
    ranks, exposures = [], []
    for score in inside:
        rivals = [rival.nats for rival in outside if rival.client == score.client]
        rank, count = 1 + sum(nats < score.nats for nats in rivals), len(rivals) + 1
        ranks.append(rank / count)
        exposures.append(math.log2(count) - math.log2(rank))

    # Clients' models are not equally good, so each client's scores are centred, members unknown.
    told = _centred(scores)
    bounds = []
    for share in SHARES:
        guesses, correct = _guessed(told, share)
        level = LEVEL / len(SHARES)
        epsilon = epsilon_at_least(correct, guesses, len(told), delta, level)
        bounds.append((epsilon, guesses, correct))
    epsilon, guesses, correct = max(bounds)
    return Row(
        seen=seen,
        copies=copies,
        canaries=len(scores),
        members=len(inside),
        told_apart=_told_apart(told),
        rank=median(ranks) if ranks else math.nan,
        exposure=median(exposures) if exposures else math.nan,
        guesses=guesses,
        correct=correct,
        epsilon=epsilon,
        delta=delta,
    )


def _centred(scores: Sequence[Score]) -> list[tuple[float, bool]]:
    """Return (score less the median of its client's, whether it was in), lowest first.

    Equal ones stay in the order in which they were made up, which knows nothing of who was in.
    """
    middle = {}
    for client in {score.client for score in scores}:
        middle[client] = median(score.nats for score in scores if score.client == client)
    told = [(score.nats - middle[score.client], score.member) for score in scores]
    return sorted(told, key=lambda one: one[0])


def _guessed(told: Sequence[tuple[float, bool]], share: float) -> tuple[int, int]:
    """Return guesses and how many are right: the lowest were in, as many of the highest were not.

    share: of all canaries that are guessed at; the rest are in the middle.
    """
    half = int(share * len(told) / 2)
    lowest, highest = told[:half], told[len(told) - half :]
    right = sum(member for _, member in lowest) + sum(not member for _, member in highest)
    return 2 * half, right


def _told_apart(told: Iterable[tuple[float, bool]]) -> float:
    """Return the area under the curve of true over false positives (Mann-Whitney)."""
    inside = [nats for nats, member in told if member]
    outside = [nats for nats, member in told if not member]
    if not inside or not outside:
        return math.nan
    wins = sum((a < b) + (a == b) / 2 for a in inside for b in outside)
    return wins / (len(inside) * len(outside))
