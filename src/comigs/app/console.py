"""What the command line shows: a live line on a terminal, plain lines elsewhere, the result only
with --quiet.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

from rich import box
from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Column
from rich.table import Table as RichTable
from rich.text import Text

from comigs import text as f
from comigs.runs.metrics import Absent, Evaluation, Event, Note, RoundEnd, Step, Train, Warned

if TYPE_CHECKING:
    from comigs.config import Config
    from comigs.text import Table

MANY = 8  # clients above which a round is one line with their means
LAST = "measuring the result"


class Console:
    """Listens to a run (`report`, `say`) and prints. Use as a context while something runs."""

    def __init__(self, config: Config | None = None, quiet: bool = False) -> None:
        self.out = RichConsole(highlight=False)
        self.config = config
        self.quiet = quiet
        self.progress: Progress | None = None
        self.began: tuple[float, float] | None = (
            None  # (seconds, exchanges done) when the first step came
        )
        self.reached: dict[
            str, float
        ] = {}  # client -> which share of its steps in this round is done
        self.trained: list[Train] = []  # of the round being shown, as is what is measured
        self.measured: dict[str, list[Evaluation]] = defaultdict(list)  # by model

    def __enter__(self) -> Self:
        if self.config is not None and not self.quiet:
            c = self.config
            clients, rounds, steps = (
                f.plural(n, what)
                for n, what in (
                    (len(c.clients), "client"),
                    (c.rounds, "round"),
                    (c.client.steps, "step"),
                )
            )
            self.say(f"{clients}, method {c.method}, {rounds} of {steps}")
            if self.out.is_terminal:
                self._start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def say(self, line: str, style: str | None = None) -> None:
        """A line of progress."""
        if not self.quiet:
            self.result(line, style)

    def result(self, line: str, style: str | None = None) -> None:
        """A line that is shown even with --quiet."""
        self.out.print(Text(line), style=style, soft_wrap=True)

    def table(self, table: Table, title: str | None = None) -> None:
        """A table with its closing row, words to the left and numbers to the right."""
        shown = RichTable(
            title=title, title_justify="left", title_style="bold", show_footer=table.last is not None,
            box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1),
        )  # fmt: skip
        for number, header in enumerate(table.headers):
            footer = table.last[number] if table.last else ""
            shown.add_column(
                header,
                Text(footer),
                justify="left" if number < table.names else "right",
                overflow="fold",
            )
        style = dict.fromkeys(table.best, "bold") | dict.fromkeys(table.second, "underline")
        for r, row in enumerate(table.rows):
            shown.add_row(*(Text(cell, style.get((r, c), "")) for c, cell in enumerate(row)))
        self.out.print(shown)

    def report(self, event: Event) -> None:
        """Show an event: a step, a line of metrics.jsonl, or a note on what is going on."""
        if self.quiet:
            return
        show: dict[type[Event], Callable[[Any], None]] = {
            Note: self._note,
            Step: self._step,
            Train: self._train,
            Evaluation: self._evaluation,
            Absent: self._absent,
            RoundEnd: self._round_end,
            Warned: self._warning,
        }
        if type(event) in show:
            show[type(event)](event)

    def _start(self) -> None:
        """The live line: what is going on, a bar, time left."""
        self.progress = Progress(
            TextColumn(
                "{task.description}",
                markup=False,
                table_column=Column(no_wrap=True, overflow="ellipsis"),
            ),
            BarColumn(bar_width=16),
            TaskProgressColumn(),
            TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True)),
            console=self.out,
            transient=True,
        )
        self.progress.add_task("starting", total=None, left="")
        self.progress.start()

    def _show(self, description: str, done: float | None = None) -> None:
        """Put words on the live line; done: exchanges so far, summed over clients."""
        if self.progress is None:
            return
        task = self.progress.task_ids[0]
        if done is None:
            self.progress.update(task, description=description)
        else:
            self.progress.update(
                task,
                description=description,
                completed=done,
                total=self._total(),
                left=self._left(done),
            )

    def _before(self, round: int) -> int:
        """Exchanges with clients before that round."""
        assert self.config is not None
        return (round - 1) * (
            self.config.participation.clients_per_round or len(self.config.clients)
        )

    def _total(self) -> int:
        """Exchanges of the whole run: of those asked in each round, and the last one with all,
        which only measures.
        """
        assert self.config is not None
        return self._before(self.config.rounds + 1) + len(self.config.clients)

    def _left(self, done: float) -> str:
        """'about 20 s left', from the pace since the first step; '' before there is any."""
        if self.began is None or done <= self.began[1]:
            return ""
        seconds = (
            (time.monotonic() - self.began[0]) / (done - self.began[1]) * (self._total() - done)
        )
        return f"{f.duration(seconds, 'about')} left"

    def _note(self, note: Note) -> None:
        if note.say:
            self.say(note.message, style="yellow")
        else:
            self._show(note.message)

    def _step(self, step: Step) -> None:
        assert self.config is not None
        before = self._before(step.round)
        self.began = self.began or (time.monotonic(), before)
        self.reached[step.client] = min(step.step / self.config.client.steps, 1)
        where = f"round {step.round}/{self.config.rounds}  {step.client}"
        done = before + sum(self.reached.values())
        self._show(f"{where}  {step.level} {step.nats_per_token:.3f} nats/token", done)

    def _train(self, line: Train) -> None:
        self.trained.append(line)

    def _evaluation(self, line: Evaluation) -> None:
        self.measured[line.model].append(line)

    def _absent(self, line: Absent) -> None:
        assert self.config is not None
        where = f"round {line.round}/{self.config.rounds}"
        if line.round > self.config.rounds:
            where = "last exchange"
        self.say(f"{where}  {line.client}  absent: {line.reason}", style="yellow")

    def _round_end(self, server: RoundEnd) -> None:
        """A round is whole: a line per client, or of their means where there are many."""
        assert self.config is not None
        rounds, names = self.config.rounds, [line.client for line in self.trained]
        groups = (
            {f"{len(names)} clients' mean": names}
            if len(names) > MANY
            else {name: [name] for name in names}
        )
        width = max(map(len, groups), default=0)
        start = f"round {server.round}/{rounds}"
        for name, members in groups.items():
            if base := _measured(self.measured["base"], members):
                self.say(f"{'base':{len(start)}}  {name:{width}}  {base}")
        for name, members in groups.items():
            nats = _mean(
                [line.train_nats_per_token for line in self.trained if line.client in members]
            )
            parts = [f"train {nats:.3f} nats/token"] if nats is not None else ["nothing trained"]
            if personal := _measured(self.measured["personal"], members):
                parts.append(f"{personal} after round {server.round - 1}")
            self.say(f"{start}  {name:{width}}  {', '.join(parts)}")
        done = self._before(server.round + 1)
        if self.progress is None and server.round < rounds and (left := self._left(done)):
            self.say(f"{start}  {left}")
        self._show(LAST if server.round == rounds else f"{start} done", done)
        self.trained.clear()
        self.measured.clear()
        self.reached.clear()

    def _warning(self, line: Warned) -> None:
        who = f"client {line.client}: " if line.client else ""
        self.say(f"warning: {line.sign}: {who}{line.message}", style="yellow")


def _measured(lines: list[Evaluation], clients: list[str]) -> str:
    """'valid perplexity 12.1, test perplexity 12.3': of these clients, or their mean; '' where
    nothing was measured.
    """
    splits: dict[str, list[float | None]] = defaultdict(list)
    for line in lines:
        if line.client in clients:
            splits[line.split].append(line.perplexity)
    return ", ".join(
        f"{split} perplexity {f.perplexity(_mean(values))}" for split, values in splits.items()
    )


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None
