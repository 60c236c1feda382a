"""The curves of a run as rows of figures, made of nothing but committed lines."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from comigs.config import Config
from comigs.runs.metrics import ClientLine, Evaluation, Line, RoundEnd, Train
from comigs.runs.report.results import mean

SERVER = "server"
Figures = Mapping[str, float | None]


@dataclass(frozen=True)
class Row:
    """A row is what is known of one client, or of the server, at one moment of a run.

    number: of this row among all rows of the run, from 0. of: "clients/NAME" or "server". round:
    the moment on the report's axis. step: the same as a whole number, which is the round, or, for
    figures of single steps, the number of the step in the whole run.
    """

    number: int
    of: str
    round: float
    step: int
    figures: Mapping[str, float]


class Curves:
    """Curves turn a run's lines into rows, each moment once, in the order of the lines.

    The same lines give the same rows with the same numbers, whenever and in however many parts
    they come. Clients are client-1, client-2, ... unless the config lets their names be seen.
    """

    def __init__(self, config: Config) -> None:
        self.steps = config.client.steps
        self.names: dict[str, str] = {}
        for number, client in enumerate(config.clients, start=1):
            self.names[client.name] = client.name if config.track.names else f"client-{number}"
        self._known: set[tuple[str, int, str]] = set()
        self._rows = 0

    def rows(self, lines: Iterable[Line]) -> list[Row]:
        """Return the rows of the next lines of the run."""
        rows = []
        for line in lines:
            of = self._place(line)
            for round, step, figures in self._moments(line):
                if new := dict(self._new(of, step, figures)):
                    rows.append(Row(self._rows, of, round, step, new))
                    self._rows += 1
        return rows

    def _new(self, of: str, step: int, figures: Figures) -> Iterator[tuple[str, float]]:
        """Give the figures that were measured, are numbers, and were in no row before."""
        for name, value in figures.items():
            key = of, step, name
            if value is not None and math.isfinite(value) and key not in self._known:
                self._known.add(key)
                yield name, value

    def _place(self, line: Line) -> str:
        if isinstance(line, ClientLine):
            return f"clients/{self.names[line.client]}"
        return SERVER

    def _moments(self, line: Line) -> Iterator[tuple[float, int, Figures]]:
        """Give the moments that a line says something about: round, step, and figures."""
        # Steps lie between the ends of two rounds; all else is of the end of one.
        end = float(line.round)
        if isinstance(line, Train):
            nats, before = line.train_nats_per_token_by_step, line.round - 1
            for number, loss in enumerate(nats, start=1):
                round, step = before + number / len(nats), before * self.steps + number
                yield round, step, {"train_nats_per_token_by_step": loss}
            share = mean(line.generalist_share_by_layer or ())
            loss_of_round = {"train_nats_per_token": line.train_nats_per_token}
            yield end, line.round, loss_of_round | {"generalist_share": share}
        elif isinstance(line, Evaluation):
            which = f"base_{line.split}" if line.model == "base" else line.split
            figures = {"nats_per_token": line.nats_per_token, "perplexity": line.perplexity}
            yield end, line.round, {f"{which}_{name}": value for name, value in figures.items()}
        elif isinstance(line, RoundEnd):
            yield end, line.round, {"drift": line.drift}
