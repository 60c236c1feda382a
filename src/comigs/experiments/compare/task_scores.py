"""This module says what the models of each setting got right, and the base, where they were asked
tasks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from comigs import text as f
from comigs.experiments.compare.statistics import Results
from comigs.experiments.compare.t_test import Spread, spread
from comigs.experiments.csv_file import Row
from comigs.experiments.run_data import RunData


@dataclass(frozen=True)
class TaskScore:
    """A measure of a task, means over clients. settings: over seeds, of each row of the results;
    None where no run was asked. base: over all runs.
    """

    task: str
    measure: str
    lower_is_better: bool
    settings: tuple[Spread | None, ...]
    base: float


class How(NamedTuple):
    """This says how a run was asked a task, without which figures cannot be compared.

    settings: in words; packed files from before they were recorded have none. round: after which;
    None: the last one. items: of each client, of a task of the harness, which has the same for
    every seed.
    """

    by: str
    settings: str
    round: int | None
    items: tuple[int, ...]

    def words(self) -> str:
        """Return all of it in words."""
        after = f"after round {self.round}" if self.round is not None else ""
        items = " and ".join(f.plural(number, "item") for number in dict.fromkeys(self.items))
        settings = self.settings
        if self.by == "comigs" and not settings:
            settings = "with settings that were not recorded"
        return ", ".join(filter(None, (f"by {self.by}", settings, after, items)))


class Asked(NamedTuple):
    """A run was asked a measure of a task: its rows, one of each client, and where it stands."""

    number: int
    setting: str
    run: RunData
    rows: Sequence[Row]


def task_scores(results: Results) -> list[TaskScore]:
    """Return every measure that was taken, in the order of the runs' own.

    A run counts only where each of its clients was asked: clients' questions differ in difficulty;
    and only where they were asked as in most runs.
    """
    scores = []
    for (task, measure), ways in _ways(results).items():
        usual = ways[_usual(ways)]
        own: list[list[float]] = [[] for _ in results.rows]
        for one in usual:
            own[one.number].append(_mean(one.rows, "personal"))
        base = fmean([_mean(one.rows, "base") for one in usual])
        lower = any(row.get("lower_is_better") for row in usual[0].rows)
        scores.append(TaskScore(task, measure, lower, tuple(map(spread, own)), base))
    return scores


def left_out(results: Results) -> list[str]:
    """Return the runs that do not count for a task since they were asked in another way."""
    # All measures of a task were taken at once.
    lines: dict[str, None] = {}
    for (task, _), ways in _ways(results).items():
        usual = _usual(ways)
        for how, asked in ways.items():
            if how == usual:
                continue
            named = f.listed([f"{one.setting} seed {one.run.config.seed}" for one in asked])
            line = f"{results.name}: {task}: left out: {named}, asked {how.words()}; the others"
            lines[f"{line} {usual.words()}"] = None
    return list(lines)


def _usual(ways: Mapping[How, Sequence[Asked]]) -> How:
    """Return how most runs were asked; of as many, the most items."""
    return max(ways, key=lambda how: (len(ways[how]), _mean(ways[how][0].rows, "items")))


def _mean(rows: Sequence[Row], column: str) -> float:
    """Return a column's mean, in which each client counts once."""
    return fmean(row[column] for row in rows)


def _ways(results: Results) -> dict[tuple[str, str], dict[How, list[Asked]]]:
    """Return (task, measure) -> how it was asked -> the runs, all of whose clients were."""
    found: dict[tuple[str, str], dict[How, list[Asked]]] = {}
    for number, row in enumerate(results.rows):
        for run in row.setting.runs.values():
            for key, how, rows in _of_run(run):
                ways = found.setdefault(key, {})
                ways.setdefault(how, []).append(Asked(number, row.setting.name, run, rows))
    return found


def _of_run(run: RunData) -> Iterator[tuple[tuple[str, str], How, list[Row]]]:
    """Yield what was measured of a run: a task's measure, how it was asked, and all its rows."""
    found: dict[tuple[str, str, str, str, int | None], list[Row]] = {}
    for row in run.tasks:
        number = row["round"] if row["round"] != run.last_round else None
        way = (row["by"] or "", row.get("settings") or "", number)
        found.setdefault((row["task"], row["measure"], *way), []).append(row)
    for (task, measure, by, settings, number), rows in found.items():
        if len(rows) == len(run.config.clients):
            # How many of a client's own questions can be chosen from changes with the seed.
            own = by == "comigs"
            items = () if own else tuple(row["items"] for row in rows)
            yield (task, measure), How(by, settings, number, items), rows
