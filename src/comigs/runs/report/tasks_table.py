"""What models get right on tasks, base against personal, as a table for page and terminal."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from comigs import text as f
from comigs.runs.tasks import Estimate, Measure, TaskResult, titled

PLACES = 3


def tasks_table(
    clients: Mapping[str, Mapping[str, TaskResult]], last: int | None = None
) -> f.Table | None:
    """Return a row for each task, measure and client, and for the mean over clients.

    Beside a mean over items stands its standard error; so it does beside a difference where each
    item's is known. last: the run's last round; None: all was asked after it. It is None where no
    task was done.
    """
    # Clients are read against each other, so those of one measure stand below each other.
    by_measure: dict[tuple[str, str], dict[str, Measure]] = {}
    for client, results in clients.items():
        for task, result in results.items():
            for name, measure in result.measures.items():
                shown = titled(task, result, last)
                by_measure.setdefault((shown, name), {})[client] = measure
    rows: list[tuple[str, ...]] = []
    for (task, measured), measures in by_measure.items():
        name = measured
        if any(measure.lower_is_better for measure in measures.values()):
            name = f"{measured} (lower is better)"
        for client, measure in measures.items():
            figures = (_estimate(measure.base), _estimate(measure.personal))
            gain = measure.personal.mean - measure.base.mean
            difference = f.signed(gain, measure.difference_error, PLACES)
            rows.append((task, name, client, f.count(measure.items), *figures, difference))
        if len(measures) > 1:
            rows.append((task, name, "mean", *_mean(measures)))
    if not rows:
        return None
    headers = ("task", "measure", "client", "items", "base", "personal", "difference")
    return f.Table(headers, tuple(rows), names=3)


def _mean(measures: Mapping[str, Measure]) -> tuple[str, ...]:
    """Return the items of all clients, and means in which each client counts once."""
    items = sum(measure.items for measure in measures.values())
    base = fmean(measure.base.mean for measure in measures.values())
    personal = fmean(measure.personal.mean for measure in measures.values())
    return (
        f.count(items),
        f.decimal(base),
        f.decimal(personal),
        f.signed(personal - base, None, PLACES),
    )


def _estimate(estimate: Estimate) -> str:
    return f.spread(estimate.mean, estimate.error, PLACES)
