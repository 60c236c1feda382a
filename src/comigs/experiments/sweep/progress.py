"""What is known of a sweep's runs while it goes on, and the lines that say it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from comigs import text as f
from comigs.experiments.sweep.eta import Eta, about, clock
from comigs.experiments.sweep.plan import Plan, Run
from comigs.experiments.sweep.process import Child
from comigs.experiments.sweep.state import progress
from comigs.runs.folder import RunFolder

Say = Callable[[str], None]


class Progress:
    """What is known of the runs, and the lines about them."""

    def __init__(self, plan: Plan, jobs: int, say: Say, again: str = "") -> None:
        self.plan, self.jobs, self.say, self.again = plan, jobs, say, again
        self.states = dict(plan.states)
        self.failed: dict[str, str] = {}  # label -> why
        self.pace = Eta()
        for run in plan.runs:
            self.pace.learn(run, self.states[run.label], here=False)
        self.waiting = deque(run for run in plan.runs if not self.states[run.label].finished)
        self.deferred: set[str] = (
            set()
        )  # labels of runs that somebody else works on: their turn comes once more
        self.running: list[tuple[Run, Child]] = []
        self.width = max(len(run.label) for run in plan.runs)

    def left(self) -> str:
        """'about 5 h'; '' where nothing has been timed yet."""
        todo = [(run, self.states[run.label], 0.0) for run in self.waiting]
        todo += [(run, self.states[run.label], child.elapsed) for run, child in self.running]
        seconds = self.pace.left(todo, self.jobs)
        return "" if seconds is None else about(seconds)

    def announce(self) -> None:
        """How many runs, how far they are, how long it will take."""
        words = [state.word for state in self.states.values()]
        counts = ", ".join(
            f"{words.count(word)} {word}" for word in ("done", "to resume", "new") if word in words
        )
        self.say(f"{f.plural(len(words), 'run')} in {self.plan.folder}: {counts}")
        if self.waiting:
            self.say(
                f"{self.left() or 'estimate after the first round'}, {f.plural(self.jobs, 'run')} at once"
            )

    def list_runs(self) -> None:
        """A line for each run: what would be done."""
        for run in self.plan.runs:
            state = self.states[run.label]
            seconds = self.pace.left([(run, state, 0.0)], 1)
            detail = (
                [f"round {state.round} of {run.config.rounds}"]
                if state.begun and not state.finished
                else []
            )
            detail += (
                [perplexity(run)]
                if state.finished
                else [about(seconds)]
                if seconds is not None
                else []
            )
            self.say(f"{run.label:{self.width}}  {state.word:9}  {'  '.join(detail)}".rstrip())

    def first_estimate(self) -> bool:
        """Look whether a run has a whole round by now; said once there is something to go by."""
        for run, _ in self.running:
            if (run.path / "checkpoint.json").is_file():
                self.pace.learn(run, progress(run.path))
        if left := self.left():
            self.say(f"{left} left")
        return bool(left)

    def ended(self, run: Run, child: Child | None, problem: str) -> None:
        """A line for a run that is over."""
        if not problem:
            state = progress(run.path)
            self.pace.learn(run, state)
            if child is not None:
                self.pace.learn_start(self.states[run.label], state, child.elapsed)
            self.states[run.label] = state
        else:
            self.failed[run.label] = problem
        over = sum(s.finished for s in self.states.values()) + len(self.failed)
        parts = [f"[{over}/{len(self.plan.runs)}] {run.label:{self.width}}"]
        parts.append(f"failed: {problem}" if problem else perplexity(run))
        parts += [clock(child.elapsed)] if child is not None and not problem else []
        parts += (
            [f"left {left}"] if (self.waiting or self.running) and (left := self.left()) else []
        )
        self.say("  ".join(parts))


def perplexity(run: Run) -> str:
    """The result of a finished run: the clients' mean."""
    return f"perplexity {f.perplexity(RunFolder.open(run.path).summary()['mean']['test']['perplexity'])}"
