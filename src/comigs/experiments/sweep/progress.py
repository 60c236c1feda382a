"""This module keeps what is known of a sweep's runs while it goes on, and says it in lines."""

from __future__ import annotations

from collections import Counter, deque

from comigs import text as f
from comigs.experiments.sweep.eta import Eta
from comigs.experiments.sweep.plan import Plan, Run
from comigs.experiments.sweep.process import Command
from comigs.experiments.sweep.state import state_of
from comigs.text import Say


class Progress:
    """The progress of a sweep: which runs wait, run or have failed, and what is said of them.

    states: how far each run was when it was looked at last, by label. again: the command that goes
    on with the sweep.
    """

    def __init__(self, plan: Plan, jobs: int, say: Say, again: str = "") -> None:
        self.plan, self.jobs, self.say, self.again = plan, jobs, say, again
        self.states = dict(plan.states)
        self.failed: dict[str, str] = {}  # label -> why
        self.deferred: set[str] = (
            set()
        )  # labels of runs that somebody else works on: once more later
        self.running: list[tuple[Run, Command]] = []
        self.waiting = deque(run for run in plan.runs if not self.states[run.label].finished)
        self.width = max(len(run.label) for run in plan.runs)
        self.told_types = False
        self.eta = Eta()
        for run in plan.runs:
            self.eta.learn(run, self.states[run.label], here=False)

    def left(self) -> str:
        """Return how long all takes from now, as 'about 5 h'; '' where nothing is timed yet."""
        todo = [(run, self.states[run.label], 0.0) for run in self.waiting]
        todo += [(run, self.states[run.label], command.elapsed) for run, command in self.running]
        seconds = self.eta.left(todo, self.jobs)
        return "" if seconds is None else f.duration(seconds, "about")

    def announce(self) -> None:
        """Say how many runs there are, how far they are, and how long they will take."""
        words = [state.word for state in self.states.values()]
        counts = []
        for word in ("done", "to resume", "new"):
            if word in words:
                counts.append(f"{words.count(word)} {word}")
        self.say(f"{f.plural(len(words), 'run')} in {self.plan.folder}: {', '.join(counts)}")
        if self.waiting:
            estimate = self.left() or "estimate after the first round"
            self.say(f"{estimate}, {f.plural(self.jobs, 'run')} at once")

    def list_runs(self) -> None:
        """Say for each run, in a line of its own, what would be done."""
        for run in self.plan.runs:
            state = self.states[run.label]
            details = []
            if state.begun and not state.finished:
                details.append(f"round {state.round} of {run.config.rounds}")
            seconds = self.eta.left([(run, state, 0.0)], 1)
            if state.finished:
                details.append(f"perplexity {f.perplexity(state.perplexity)}")
            elif seconds is not None:
                details.append(f.duration(seconds, "about"))
            self.say(f"{run.label:{self.width}}  {state.word:9}  {'  '.join(details)}".rstrip())

    def first_estimate(self) -> bool:
        """Say how much time is left once a run has a whole round, and return whether one has."""
        for run, _ in self.running:
            if (run.path / "checkpoint.json").is_file():
                self.eta.learn(run, state_of(run.path))
        left = self.left()
        if left:
            self.say(f"{left} left")
        return bool(left)

    def ended(self, run: Run, command: Command | None, problem: str) -> None:
        """Say that a run is over. command: what ran it, if it needed to; problem: "" where none."""
        # first what is known, so that the line below counts this run as well
        if problem:
            self.failed[run.label] = problem
        else:
            state = state_of(run.path)
            self.eta.learn(run, state)
            if command is not None:
                self.eta.learn_start(run, self.states[run.label], state, command.elapsed)
            self.states[run.label] = state

        # then the line: which of how many, the result, how long it took, how long it goes on
        over = sum(s.finished for s in self.states.values()) + len(self.failed)
        parts = [f"[{over}/{len(self.plan.runs)}] {run.label:{self.width}}"]
        result = f"perplexity {f.perplexity(self.states[run.label].perplexity)}"
        parts.append(f"failed: {problem}" if problem else result)
        if command is not None and not problem:
            parts.append(f.duration(command.elapsed, "clock"))
        if (self.waiting or self.running) and (left := self.left()):
            parts.append(f"left {left}")
        self.say("  ".join(parts))
        self._tell_types_apart()

    def _tell_types_apart(self) -> None:
        """Say once that runs whose configs leave it open compute in different types of number."""
        types: Counter[str] = Counter()
        for run in self.plan.runs:
            state = self.states[run.label]
            if run.config.base.dtype == "auto" and state.finished and state.dtype is not None:
                types[state.dtype] += 1
        if len(types) > 1 and not self.told_types:
            counts = [f"{type} in {f.plural(number, 'run')}" for type, number in types.items()]
            self.say(
                f'note: base.dtype = "auto" came to {f.listed(counts)}, whose bases differ to '
                "comigs compare; give base.dtype to have one"
            )
            self.told_types = True
