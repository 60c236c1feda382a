"""This module estimates how long runs take, from the runs that have been timed."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from comigs.config import Config
from comigs.experiments.sweep.plan import Run
from comigs.experiments.sweep.state import RunState

START = 10.0  # seconds to import torch, load the base and write the report, until it is measured
Timing = tuple[tuple[str, ...], float]  # a run's choice, and its seconds per unit of work


class Eta:
    """An estimate of time: a run takes as long as the timed runs that are most like it.

    Those most like it share most values of the axes. Runs that were there before this sweep began,
    on whatever machine, say how runs compare; those of this sweep say how fast it is here and now.
    """

    def __init__(self) -> None:
        self.before: dict[str, Timing] = {}  # by label
        self.timed: dict[str, Timing] = {}  # by label; of this sweep
        self.slower = 1.0  # how much longer runs take here than those before would have it
        self.starts: list[float] = []  # seconds of processes besides training and measuring

    def learn(self, run: Run, state: RunState, here: bool = True) -> None:
        """Take in what a run, finished or not, has recorded in its whole rounds.

        here: the time was spent in this sweep.
        """
        if state.round > 0 and state.seconds > 0:
            whole = clock(run.config, state) * run.config.rounds / state.round
            timed = self.timed if here else self.before
            timed[run.label] = run.choice, whole / work(run.config)

        # runs of this sweep correct what those before it say of all others
        if self.timed and self.before:
            ratios = []
            for choice, pace in self.timed.values():
                ratios.append(pace / _pace_of_nearest(choice, self.before.values()))
            self.slower = sum(ratios) / len(ratios)

    def learn_start(self, run: Run, before: RunState, after: RunState, elapsed: float) -> None:
        """Take in how many seconds a process took beyond what it did for its run."""
        worked = clock(run.config, after) - clock(run.config, before)
        self.starts.append(max(elapsed - worked, 0.0))

    def start(self) -> float:
        """Return the seconds that a process takes beyond its run."""
        return sum(self.starts) / len(self.starts) if self.starts else START

    def seconds(self, run: Run) -> float | None:
        """Return the seconds of the whole run's training and measuring; None before any timing."""
        known = list(self.timed.values())
        for choice, pace in self.before.values():
            known.append((choice, pace * self.slower))
        if not known:
            return None
        return _pace_of_nearest(run.choice, known) * work(run.config)

    def left(self, runs: Iterable[tuple[Run, RunState, float]], jobs: int) -> float | None:
        """Return the seconds until all these runs end, `jobs` at once; None before any timing.

        Each run comes with the state it began in and the seconds that passed since then.
        """
        each = [0.0]
        for run, state, elapsed in runs:
            whole = self.seconds(run)
            if whole is None:
                return None
            to_do = whole * (1 - state.round / run.config.rounds)
            each.append(max(self.start() + to_do - elapsed, 0))
        return max(sum(each) / jobs, *each)


def _pace_of_nearest(choice: tuple[str, ...], timed: Collection[Timing]) -> float:
    """Return the mean pace of the timed runs that share most values with a choice."""
    paces: dict[int, list[float]] = {}  # by the number of values shared
    for other, pace in timed:
        paces.setdefault(sum(map(str.__eq__, other, choice)), []).append(pace)
    nearest = paces[max(paces)]
    return sum(nearest) / len(nearest)


def clock(config: Config, state: RunState) -> float:
    """Return the seconds in which clients did what is in a state, each worker one at a time."""
    return state.seconds / min(config.workers, config.asked)


def work(config: Config) -> float:
    """Return the tokens trained in a run, which its time grows with."""
    tokens = config.client.batch_size * config.data.sequence_length  # of a step
    return config.rounds * config.asked * config.client.steps * tokens
