"""What models get right beside predicting text, and the only place that knows tasks.json.

A task is asked of each client's own model and of the base: the questions of the client's test text,
or a task of lm-evaluation-harness.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

from comigs.errors import UserError
from comigs.files import ClosedFolder, writing
from comigs.runs.json_lines import parse_json, read_record
from comigs.runs.metrics import Count, Figure, Record

TASKS = "tasks.json"
Settings = dict[str, str | int | None]


class Estimate(Record):
    """A mean over items, and the standard error of that mean; None where there is none."""

    mean: Figure
    error: Figure | None = None


class Measure(Record):
    """A measure was taken of both models on so many items."""

    items: Count
    base: Estimate
    personal: Estimate


class TaskResult(Record):
    """A task was done by a client's model and by the base.

    by: what measured it. round: the round after which it was, of the run. settings: how.
    """

    by: str
    round: Count
    settings: Settings
    measures: dict[str, Measure]


class Tasks(Record):
    """All tasks that were done in a run: client -> task -> result."""

    clients: dict[str, dict[str, TaskResult]]

    def __or__(self, other: Tasks) -> Tasks:
        """Return what is in either; what is in both is the other's."""
        clients = dict(self.clients)
        for name, results in other.clients.items():
            clients[name] = {**clients.get(name, {}), **results}
        return Tasks(clients=clients)


def estimate(scores: Sequence[float]) -> Estimate:
    """Return the mean of items' scores and its standard error, sd / sqrt(items)."""
    error = stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else None
    return Estimate(mean=fmean(scores), error=error)


def read_tasks(folder: ClosedFolder) -> Tasks:
    """Read a run's tasks.json; without one, nothing was asked. Raises UserError."""
    if not folder.has(TASKS):
        return Tasks(clients={})
    path = str(folder.path / TASKS)
    try:
        values = parse_json(folder.read(TASKS))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON: {error.msg}; remove it and evaluate again") from None
    return read_record(Tasks, values, path)


def add_tasks(folder: ClosedFolder, client: str, results: Mapping[str, TaskResult]) -> Tasks:
    """Put a client's results beside what is in a run's tasks.json, and return all of it.

    A task that was done before is replaced. The file is written whole. Raises UserError.
    """
    tasks = read_tasks(folder) | Tasks(clients={client: dict(results)})
    text = json.dumps(tasks.as_json(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    with writing(folder.path, "make room or allow writing, then measure again"):
        folder.write(TASKS, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))
    return tasks
