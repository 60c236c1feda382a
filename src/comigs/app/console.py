"""This module prints what the command line shows.

That is a live line on a terminal, plain lines elsewhere, and the result only with --quiet.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Column
from rich.text import Text

from comigs import text as f
from comigs.app.tables import show_table
from comigs.runs.metrics import Absent, Evaluation, Event, Note, RoundEnd, Step, Train, Warned
from comigs.runs.simulated import Exchange

if TYPE_CHECKING:
    from comigs.config import Config
    from comigs.text import Table

MANY = 8  # clients above which a round is one line with their means
LAST = "measuring the result"


class Console:
    """A console listens to a run (`report`, `say`) and prints. It is a context while a run goes on.

    config: of the run; None where nothing is run. quiet: only results are shown.
    """

    def __init__(self, config: Config | None = None, quiet: bool = False) -> None:
        self.out = RichConsole(highlight=False)
        self.config = config
        self.quiet = quiet
        self.progress: Progress | None = None  # the live line
        self.began: tuple[float, float] | None = None  # time and exchanges done at the first step
        # of the round being shown: the share of steps done by client, what is trained and measured
        self.reached: dict[str, float] = {}
        self.trained: list[Train] = []
        self.measured: dict[str, list[Evaluation]] = defaultdict(list)  # by model

    def __enter__(self) -> Self:
        if self.config is not None and not self.quiet:
            clients = f.plural(len(self.config.clients), "client")
            rounds = f.plural(self.config.rounds, "round")
            steps = f.plural(self.config.client.steps, "step")
            self.say(f"{clients}, method {self.config.method}, {rounds} of {steps}")
            if self.out.is_terminal:
                self._start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def say(self, line: str, style: str | None = None) -> None:
        """Show a line of progress."""
        if not self.quiet:
            self.result(line, style)

    def result(self, line: str, style: str | None = None) -> None:
        """Show a line, even with --quiet."""
        self.out.print(Text(f.one_line(line)), style=style, soft_wrap=True)

    def table(self, table: Table, title: str | None = None) -> None:
        """Show a table with its closing row: see `show_table`."""
        show_table(self.out, table, title)

    def report(self, event: Event) -> None:
        """Show an event: a step, a line of metrics.jsonl, or a note on what is going on."""
        if self.quiet:
            return

        # what is not here, as the last download, is nothing that anybody waits for
        show: dict[type[Event], Callable[[Any], None]] = {
            Note: self._note,
            Step: self._step,
            Train: self.trained.append,
            Evaluation: self._evaluation,
            Absent: self._absent,
            Exchange: self._exchange,
            RoundEnd: self._round_end,
            Warned: self._warning,
        }
        if type(event) in show:
            show[type(event)](event)

    @property
    def _run(self) -> Config:
        """The config of the run that is shown."""
        assert self.config is not None
        return self.config

    def _start(self) -> None:
        """Start the live line: what is going on, a bar, time left."""
        # a long client name must not push the bar out of the line
        description = TextColumn(
            "{task.description}",
            markup=False,
            table_column=Column(no_wrap=True, overflow="ellipsis"),
        )
        left = TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True))
        self.progress = Progress(
            description,
            BarColumn(bar_width=16),
            TaskProgressColumn(),
            left,
            console=self.out,
            transient=True,
        )
        self.progress.add_task("starting", total=None, left="")
        self.progress.start()

    def _show(self, description: str, done: float | None = None) -> None:
        """Put words on the live line. done: exchanges so far, over all clients; None: as before."""
        if self.progress is None:
            return
        moved: dict[str, Any] = {}
        if done is not None:
            moved = {"completed": done, "total": self._total(), "left": self._left(done)}
        self.progress.update(
            self.progress.task_ids[0], description=f.one_line(description), **moved
        )

    def _before(self, number: int) -> int:
        """Return how many exchanges with clients come before that round."""
        return (number - 1) * self._run.asked

    def _total(self) -> int:
        """Return the exchanges of the whole run, with the last one, which measures all clients."""
        return self._before(self._run.rounds + 1) + len(self._run.clients)

    def _left(self, done: float) -> str:
        """Return 'about 20 s left', from the pace since the first step; '' before there is any."""
        if self.began is None or done <= self.began[1]:
            return ""
        pace = (time.monotonic() - self.began[0]) / (done - self.began[1])
        return f"{f.duration(pace * (self._total() - done), 'about')} left"

    def _note(self, note: Note) -> None:
        if note.say:
            self.say(note.message, style="yellow")
        else:
            self._show(note.message)

    def _step(self, step: Step) -> None:
        before = self._before(step.round)
        self.began = self.began or (time.monotonic(), before)
        self.reached[step.client] = min(step.step / self._run.client.steps, 1)
        where = f"round {step.round}/{self._run.rounds}  {step.client}"
        done = before + sum(self.reached.values())
        self._show(f"{where}  {step.level} {step.nats_per_token:.3f} nats/token", done)

    def _evaluation(self, line: Evaluation) -> None:
        self.measured[line.model].append(line)

    def _absent(self, line: Absent) -> None:
        where = f"round {line.round}/{self._run.rounds}"
        if line.round > self._run.rounds:
            where = "last exchange"
        self.say(f"{where}  {line.client}  absent: {line.reason}", style="yellow")

    def _exchange(self, line: Exchange) -> None:
        took, since = f.duration(line.ended - line.began), f.duration(line.ended)
        where = f"round {line.round}/{self._run.rounds}"
        self.say(f"{where}  took {took} of simulated time; {since} since the run began")

    def _round_end(self, end: RoundEnd) -> None:
        """Show a whole round: a line for each client, or one of their means if there are many."""
        rounds, names = self._run.rounds, [line.client for line in self.trained]
        groups = {name: [name] for name in names}
        if len(names) > MANY:
            groups = {f"{len(names)} clients' mean": names}
        width = max(map(len, groups), default=0)
        start = f"round {end.round}/{rounds}"

        # the base is what all later figures are compared with, so all of it comes first
        for name, members in groups.items():
            if base := _measured(self.measured["base"], members):
                self.say(f"{'base':{len(start)}}  {name:{width}}  {base}")

        # a client is measured when it is asked, and so as the round before has left it
        for name, members in groups.items():
            trained = [line for line in self.trained if line.client in members]
            nats = _mean([line.train_nats_per_token for line in trained])
            # A private device says what it spent, and nothing of its loss.
            epsilons = [line.epsilon for line in trained if line.epsilon is not None]
            if nats is not None:
                parts = [f"train {nats:.3f} nats/token"]
            elif epsilons:
                parts = [f"trained, epsilon {max(epsilons):.1f}; its figures stay with it"]
            else:
                parts = ["nothing trained"]
            if personal := _measured(self.measured["personal"], members):
                parts.append(f"{personal} after round {end.round - 1}")
            self.say(f"{start}  {name:{width}}  {', '.join(parts)}")

        # the live line shows the time left already
        done = self._before(end.round + 1)
        if self.progress is None and end.round < rounds and (left := self._left(done)):
            self.say(f"{start}  {left}")
        self._show(LAST if end.round == rounds else f"{start} done", done)
        self.trained.clear()
        self.measured.clear()
        self.reached.clear()

    def _warning(self, line: Warned) -> None:
        who = f"client {line.client}: " if line.client else ""
        self.say(f"warning: {line.sign}: {who}{line.message}", style="yellow")


def _measured(lines: list[Evaluation], clients: list[str]) -> str:
    """Return 'valid perplexity 12.1, test perplexity 12.3': the mean of these clients.

    '' where nothing was measured.
    """
    splits: dict[str, list[float | None]] = defaultdict(list)
    for line in lines:
        if line.client in clients:
            splits[line.split].append(line.perplexity)
    parts = [f"{name} perplexity {f.perplexity(_mean(each))}" for name, each in splits.items()]
    return ", ".join(parts)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
