"""How long runs take, from those that have been timed."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from comigs.config import Config
from comigs.experiments.sweep.plan import Run
from comigs.experiments.sweep.state import RunState

START = (
    10.0  # seconds to import torch, load the base and write the report; until it is measured here
)
Timing = tuple[tuple[str, ...], float]  # a run's choice, its seconds per unit of work


class Eta:
    """Seconds per unit of work. A run is taken to go as the timed runs do that share most values of
    the axes.

    Runs that were there before this sweep began, on whatever machine, say how runs compare; those
    of this sweep say how fast it is here and now.
    """

    def __init__(self) -> None:
        self.before: dict[str, Timing] = {}  # by label
        self.timed: dict[str, Timing] = {}  # by this sweep
        self.slower = 1.0  # how much longer runs take here than those before would have it
        self.starts: list[
            float
        ] = []  # seconds of processes in which nothing was trained or measured

    def learn(self, run: Run, state: RunState, here: bool = True) -> None:
        """Take in what a run, finished or not, has recorded; nothing where no round of it is
        whole.
        """
        if state.round > 0 and state.seconds > 0:
            pace = state.seconds / work(run.config) * run.config.rounds / state.round
            (self.timed if here else self.before)[run.label] = run.choice, pace
        if self.timed and self.before:
            ratios = [
                pace / _like(choice, self.before.values()) for choice, pace in self.timed.values()
            ]
            self.slower = sum(ratios) / len(ratios)

    def learn_start(self, before: RunState, after: RunState, elapsed: float) -> None:
        """Take in how much longer a process took than what it did for the run."""
        self.starts.append(max(elapsed - (after.seconds - before.seconds), 0.0))

    def start(self) -> float:
        """Seconds that a process takes besides."""
        return sum(self.starts) / len(self.starts) if self.starts else START

    def seconds(self, run: Run) -> float | None:
        """Of training and measuring in the whole run; None where nothing has been timed."""
        known = [
            *self.timed.values(),
            *((choice, pace * self.slower) for choice, pace in self.before.values()),
        ]
        return _like(run.choice, known) * work(run.config) if known else None

    def left(self, runs: Iterable[tuple[Run, RunState, float]], jobs: int) -> float | None:
        """Seconds until all these runs end, `jobs` at once; each with where it began and its
        seconds since then.
        """
        each = []
        for run, state, elapsed in runs:
            whole = self.seconds(run)
            if whole is None:
                return None
            rest = whole * (1 - state.round / run.config.rounds)
            each.append(max(self.start() + rest - elapsed, 0))
        return max(sum(each) / jobs, max(each, default=0.0))


def _like(choice: tuple[str, ...], timed: Collection[Timing]) -> float:
    """Mean pace of those that share most values with a choice."""
    shared = [(sum(map(str.__eq__, other, choice)), pace) for other, pace in timed]
    most = max(number for number, _ in shared)
    nearest = [pace for number, pace in shared if number == most]
    return sum(nearest) / len(nearest)


def work(config: Config) -> float:
    """Tokens trained in a run: what its time grows with."""
    return config.rounds * len(config.clients) * config.client.steps * config.client.batch_size * (
        config.data.sequence_length
    )  # fmt: skip


def clock(seconds: float) -> str:
    """How long something took: 50 s, 4 min 10 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def about(seconds: float) -> str:
    """How long something will take: about 50 s, about 5 min, about 1.5 h, about 12 h."""
    if seconds < 90:
        return f"about {seconds:.0f} s"
    if seconds < 5400:
        return f"about {seconds / 60:.0f} min"
    return f"about {seconds / 3600:.{1 if seconds < 36000 else 0}f} h"
