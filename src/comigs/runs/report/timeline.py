"""This module says who worked when in a run with simulated devices, and what came of it.

Nothing is drawn here.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from statistics import fmean, median
from typing import Literal

from comigs.runs.report.read import Run
from comigs.runs.simulated import round_times
from comigs.text import duration

Outcome = Literal["counted", "late", "refused", "lost"]
MAX_CLIENTS = 40  # that are shown: those that were lost most often first


@dataclass(frozen=True)
class Span:
    """A client worked from one simulated second to another in a round."""

    client: str
    begins: float
    ends: float
    outcome: Outcome


@dataclass(frozen=True)
class Timeline:
    """A timeline has the clients that are shown, their spans, the seconds at which rounds end, and
    who was away for a whole round: (client, the seconds in the middle of the round).

    took: how long rounds lasted, in words.
    """

    clients: tuple[str, ...]
    spans: tuple[Span, ...]
    ends: tuple[float, ...]
    away: tuple[tuple[str, float], ...]
    took: str
    work_lost: float | None


def timeline(run: Run) -> Timeline | None:
    """Return the timeline of a run; None where nothing was simulated."""
    if not run.exchanges:
        return None
    counted = {(line.client, line.round) for line in run.train}
    times = round_times(run.exchanges)

    # An answer that came after its round may count in a later one, or not at all.
    spans, lost = [], dict.fromkeys(run.clients, 0)
    for line in run.attempts:
        outcome: Outcome = "counted"
        if line.lost is not None:
            outcome = "lost"
        elif line.ended > times[line.round][1] or line.answered_round < line.round:
            outcome = "late"
        elif (line.client, line.round) not in counted:
            outcome = "refused"
        lost[line.client] += outcome != "counted"
        spans.append(Span(line.client, line.asked, line.ended, outcome))

    tried = {(line.client, line.round) for line in run.attempts}
    away = []
    for absent in run.absent:
        key = absent.client, absent.round
        if key not in tried and absent.round in times and not absent.reason.startswith("busy"):
            away.append((absent.client, fmean(times[absent.round])))
            lost[absent.client] += 1
    shown = sorted(run.clients, key=lambda name: -lost[name])[:MAX_CLIENTS]
    return Timeline(
        clients=tuple(name for name in run.clients if name in shown),
        spans=tuple(span for span in spans if span.client in shown),
        ends=tuple(end for _, end in times.values()),
        took=took(run),
        away=tuple(each for each in away if each[0] in shown),
        work_lost=work_lost(run),
    )


def took(run: Run) -> str:
    """Return how long the rounds lasted, as 24.5 h: 60.0 min at the median, 60.0 min to 3.4 h."""
    seconds = [ended - began for began, ended in round_times(run.exchanges).values()]
    usual = f"{duration(sum(seconds))}: {duration(median(seconds))}"
    if max(seconds) <= 1.01 * min(seconds):
        return f"{usual} each"
    return f"{usual} at the median, {duration(min(seconds))} to {duration(max(seconds))}"


def work_lost(run: Run, clients: Collection[str] | None = None) -> float | None:
    """Return the share of the tokens trained on, by these clients or all, that came to nothing.

    It is None where there are none.
    """
    worked, counted = worked_tokens(run, clients)
    total = sum(worked.values())
    return 1 - sum(counted.values()) / total if total else None


def worked_tokens(
    run: Run, clients: Collection[str] | None = None
) -> tuple[dict[int, int], dict[int, int]]:
    """Return round -> the tokens that these clients (all) trained on, and those that counted."""
    of = set(run.clients if clients is None else clients)
    worked: dict[int, int] = {}
    for line in run.attempts:
        if line.client in of:
            worked[line.round] = worked.get(line.round, 0) + line.tokens
    # An upload that was lost and sent again counts, though the attempt that did the work did not.
    counted: dict[int, int] = {}
    for train in run.train:
        if train.client in of:
            tokens = train.local_tokens + train.router_tokens
            counted[train.round] = counted.get(train.round, 0) + tokens
    return worked, counted
