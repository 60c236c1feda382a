"""What the comparison's plots draw, out of its figures. No drawing here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from comigs.experiments.compare.statistics import Comparison, Row, mean_by_round
from comigs.experiments.compare.stats import Spread


@dataclass(frozen=True)
class Mark:
    """A setting at one x; `number` is its place among all settings of the comparison, which gives
    colour and shape.
    """

    name: str
    number: int
    x: float
    y: Spread


@dataclass(frozen=True)
class Track:
    """A setting by round."""

    name: str
    number: int
    points: tuple[tuple[int, Spread], ...]


@dataclass(frozen=True)
class Panel:
    """One dataset in one plot."""

    title: str
    tracks: tuple[Track, ...] = ()
    marks: tuple[Mark, ...] = ()


def by_round(comparison: Comparison) -> tuple[Panel, ...]:
    """The metric on the valid text after each round, mean over clients; datasets where it was
    measured.
    """
    panels = []
    for results in comparison.datasets:
        tracks = [
            Track(
                row.setting.name, comparison.settings.index(row.setting.name), tuple(rounds.items())
            )
            for row in results.rows
            if (rounds := mean_by_round(row.setting, comparison.metric))
        ]
        panels.append(Panel(results.name, tracks=tuple(tracks)))
    return tuple(panel for panel in panels if panel.tracks)


def by_bytes(comparison: Comparison) -> tuple[Panel, ...]:
    """The metric on test against bytes uploaded per client over the whole run."""
    return _marks(
        comparison,
        lambda row: row.costs.uploaded.mean * next(iter(row.setting.runs.values())).config.rounds,
    )


def by_parameters(comparison: Comparison) -> tuple[Panel, ...]:
    """The metric on test against trained parameters per client that trains."""
    return _marks(comparison, lambda row: row.costs.parameters)


def _marks(comparison: Comparison, cost: Callable[[Row], float | None]) -> tuple[Panel, ...]:
    panels = []
    for results in comparison.datasets:
        marks = [
            Mark(row.setting.name, comparison.settings.index(row.setting.name), x, score)
            for row in results.rows
            if (score := row.scores[comparison.metric]) and (x := cost(row)) is not None
        ]
        panels.append(Panel(results.name, marks=tuple(marks)))
    return tuple(panel for panel in panels if len(panel.marks) > 1)
