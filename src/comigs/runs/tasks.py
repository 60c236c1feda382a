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
from comigs.runs.record import Count, Figure, Record

TASKS = "tasks.json"
ANSWERS = "answers"  # the clients' own questions, beside which a task of the harness has its name
LONGEST = 128  # tokens of a written answer, where nothing else is said
Settings = dict[str, str | int | None]


class Estimate(Record):
    """A mean over items, and the standard error of that mean; None where there is none."""

    mean: Figure
    error: Figure | None = None


class Measure(Record):
    """A measure was taken of both models on so many items.

    difference_error: the standard error of the mean over items of personal less base; None where
    it is not known. lower_is_better: of errors and the like.
    """

    items: Count
    base: Estimate
    personal: Estimate
    difference_error: Figure | None = None
    lower_is_better: bool = False


class TaskResult(Record):
    """A task was done by a client's model and by the base.

    by: what measured it. round: the round after which it was, of the run. settings: how.
    """

    by: str
    round: Count
    settings: Settings
    measures: dict[str, Measure]

    def unusual(self, last: int | None) -> list[str]:
        """Return in words what is unlike asking all items, as always, after the `last` round.

        last: None where the round is known to be that.
        """
        said = []
        if self.settings.get("limit") is not None:
            said.append(first_ones(self.settings["limit"]))
        longest = self.settings.get("max_new_tokens", LONGEST)
        if longest != LONGEST:
            said.append(f"at most {longest} tokens")
        if self.settings.get("chat_template") == "yes":
            said.append("by the chat template")
        if last not in (None, self.round):
            said.append(f"after round {self.round} of {last}")
        return said


class Tasks(Record):
    """All tasks that were done in a run: client -> task -> result."""

    clients: dict[str, dict[str, TaskResult]]

    def __or__(self, other: Tasks) -> Tasks:
        """Return what is in either; what is in both is the other's."""
        clients = dict(self.clients)
        for name, results in other.clients.items():
            clients[name] = {**clients.get(name, {}), **results}
        return Tasks(clients=clients)


def first_ones(limit: str | int | None) -> str:
    """Return the words for the first `limit` items of a task."""
    return f"first {limit}"


def task_name(name: str, limit: int | None, split: str = "test") -> str:
    """Return the name under which a result is kept.

    What was asked of a few items, or of another split, does not take the place of the whole.
    """
    apart = [split] if split != "test" else []
    if limit is not None:
        apart.append(first_ones(limit))
    return f"{name} ({', '.join(apart)})" if apart else name


def titled(task: str, result: TaskResult, last: int | None = None) -> str:
    """Return the name of a task with what is unusual about how it was asked, as `unusual` has it.

    What the name says already is not said again.
    """
    more = ", ".join(words for words in result.unusual(last) if words not in task)
    if not more:
        return task
    return f"{task[:-1]}, {more})" if task.endswith(")") else f"{task} ({more})"


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
