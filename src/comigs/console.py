"""What the command line shows: a live line on a terminal, plain lines elsewhere, the result only with --quiet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from rich import console as rich_console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable
from rich.text import Text

from comigs.config import Config

if TYPE_CHECKING:
    from comigs.report.tables import Table


class Console:
    """Listens to a run (`report`, `say`) and prints. Use as a context while something runs."""

    def __init__(self, config: Config | None = None, quiet: bool = False) -> None:
        self.out = rich_console.Console(highlight=False, soft_wrap=False)
        self.config = config
        self.quiet = quiet
        self.progress: Progress | None = None
        self.task: TaskID | None = None
        self.train: dict[str, float] = {}  # by client, of the round under way
        self.measured: dict[str, str] = {}

    def __enter__(self) -> Self:
        if self.config is not None and not self.quiet and self.out.is_terminal:
            self.progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeRemainingColumn(),
                console=self.out,
            )
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress is not None:
            self.progress.stop()

    def say(self, line: str) -> None:
        """A line of progress before the first round."""
        if not self.quiet:
            self.out.print(line, markup=False)

    def result(self, line: str) -> None:
        """A line that is shown even with --quiet."""
        self.out.print(line, markup=False)

    def table(self, table: Table, title: str | None = None) -> None:
        """A table with its closing row, words to the left and numbers to the right."""
        shown = RichTable(title=title, title_justify="left", title_style="bold", show_footer=table.last is not None)
        for number, header in enumerate(table.headers):
            footer = table.last[number] if table.last else ""
            shown.add_column(header, Text(footer), justify="left" if number < table.names else "right", overflow="fold")
        for row in table.rows:
            shown.add_row(*(Text(cell) for cell in row))
        self.out.print(shown)

    def report(self, event: Mapping[str, Any]) -> None:
        """A step, or a line of metrics.jsonl."""
        if not self.quiet:
            getattr(self, f"_{event['kind']}")(event)

    def _step(self, step: Mapping[str, Any]) -> None:
        assert self.config is not None
        if self.progress is None:
            return
        steps, rounds = self.config.client.steps, self.config.rounds
        if self.task is None:
            done = (step["round"] - 1) * steps * len(self.config.clients)  # of a resumed run
            self.task = self.progress.add_task("", total=rounds * steps * len(self.config.clients), completed=done)
        text = (
            f"round {step['round']}/{rounds}  {step['client']}  {step['level']} {step['nats_per_token']:.3f} nats/token"
        )
        self.progress.update(self.task, description=text, advance=1 if step["level"] == "experts" else 0)

    def _train(self, line: Mapping[str, Any]) -> None:
        self.train[line["client"]] = line["train_nats_per_token"]

    def _evaluation(self, line: Mapping[str, Any]) -> None:
        if line["model"] == "base":
            self.say(f"base      {line['client']}  {line['split']} perplexity {line['perplexity']:.2f}")
        else:
            self.measured[line["client"]] = (
                f"{line['split']} perplexity {line['perplexity']:.2f} after round {line['round']}"
            )

    def _server(self, line: Mapping[str, Any]) -> None:
        assert self.config is not None
        for client, nats in self.train.items():
            measured = f", {self.measured[client]}" if client in self.measured else ""
            self.say(f"round {line['round']}/{self.config.rounds}  {client}  train {nats:.3f} nats/token{measured}")

    def _warning(self, line: Mapping[str, Any]) -> None:
        who = f"client {line['client']}: " if line["client"] else ""
        self.say(f"warning   {line['sign']}: {who}{line['message']}")
