"""How long runs take, from those that have been timed."""

from __future__ import annotations

from collections.abc import Iterable

from comigs.config import Config
from comigs.sweep.folders import State
from comigs.sweep.plan import Run

START = 10.0  # seconds to import torch, load the base and write the report; until it is measured here


class Pace:
    """Seconds per unit of work. A run is taken to go as the timed runs do that share most values of the axes."""

    def __init__(self) -> None:
        self.timed: dict[str, tuple[tuple[str, ...], float]] = {}  # label -> choice, seconds per unit of work
        self.starts: list[float] = []  # seconds of processes in which nothing was trained or measured

    def learn(self, run: Run, state: State) -> None:
        """Take in what a run, finished or not, has recorded; nothing where no round of it is whole."""
        if state.round > 0 and state.seconds > 0:
            self.timed[run.label] = run.choice, state.seconds / work(run.config) * run.config.rounds / state.round

    def learn_start(self, before: State, after: State, elapsed: float) -> None:
        """Take in how much longer a process took than what it did for the run."""
        self.starts.append(max(elapsed - (after.seconds - before.seconds), 0.0))

    def start(self) -> float:
        """Seconds that a process takes besides."""
        return sum(self.starts) / len(self.starts) if self.starts else START

    def seconds(self, run: Run) -> float | None:
        """Of training and measuring in the whole run; None where nothing has been timed."""
        if not self.timed:
            return None
        shared = [(sum(map(str.__eq__, choice, run.choice)), pace) for choice, pace in self.timed.values()]
        most = max(number for number, _ in shared)
        nearest = [pace for number, pace in shared if number == most]
        return sum(nearest) / len(nearest) * work(run.config)

    def left(self, runs: Iterable[tuple[Run, State, float]], jobs: int) -> float | None:
        """Seconds until all these runs end, `jobs` at once; each with where it began and its seconds since then."""
        each = []
        for run, state, elapsed in runs:
            whole = self.seconds(run)
            if whole is None:
                return None
            rest = whole * (1 - state.round / run.config.rounds)
            each.append(max(self.start() + rest - elapsed, 0))
        return max(sum(each) / jobs, max(each, default=0.0))


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
