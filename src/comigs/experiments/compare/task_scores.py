"""This module says what the models of each setting got right, and the base, where they were asked
tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from comigs.experiments.compare.statistics import Results
from comigs.experiments.compare.t_test import Spread, spread
from comigs.experiments.csv_file import Row


@dataclass(frozen=True)
class TaskScore:
    """A measure of a task, means over clients. settings: over seeds, of each row of the results;
    None where no run was asked. base: over all runs.
    """

    task: str
    measure: str
    settings: tuple[Spread | None, ...]
    base: float


def task_scores(results: Results) -> list[TaskScore]:
    """Return every measure that was taken, in the order of the runs' own.

    A run counts only where each of its clients was asked: clients' questions differ in difficulty.
    """
    # (task, measure) -> number of the setting's row -> a mean over clients for each seed
    personal: dict[tuple[str, str], dict[int, list[float]]] = {}
    base: dict[tuple[str, str], list[float]] = {}
    for number, row in enumerate(results.rows):
        for run in row.setting.runs.values():
            for asked, rows in _measures(run.tasks).items():
                if len(rows) < len(run.config.clients):
                    continue
                of_setting = personal.setdefault(asked, {}).setdefault(number, [])
                of_setting.append(fmean(each["personal"] for each in rows))
                base.setdefault(asked, []).append(fmean(each["base"] for each in rows))

    scores = []
    for (task, measure), means in personal.items():
        of_rows = tuple(spread(means.get(number, [])) for number in range(len(results.rows)))
        scores.append(TaskScore(task, measure, of_rows, fmean(base[task, measure])))
    return scores


def _measures(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Return (task, measure) -> its rows, one of each client."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["task"], row["measure"]), []).append(row)
    return found
