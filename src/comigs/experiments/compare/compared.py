"""This module makes one comparison of many run folders: what is compared with what, and what has to
be said about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from comigs import text as f
from comigs.errors import UserError
from comigs.experiments.compare import tables
from comigs.experiments.compare.baseline import Baseline, baseline_named
from comigs.experiments.compare.caveats import notes, remarks
from comigs.experiments.compare.discover import Sweep, find_runs
from comigs.experiments.compare.settings import Dataset, group
from comigs.experiments.compare.statistics import Comparison, compare, metric_named
from comigs.files import command
from comigs.text import Table


@dataclass(frozen=True)
class Compared:
    """A comparison, ready to be shown or written. paths: as they were given.

    notes: what to know before its figures are believed. remarks: how runs differ in what should not
    matter.
    """

    title: str
    comparison: Comparison
    notes: tuple[str, ...]
    remarks: tuple[str, ...]
    paths: tuple[Path, ...]

    def tables(self, brief: bool = False) -> list[tuple[str, Table]]:
        """Return every table with its name. brief: only those for a terminal."""
        c, shown = self.comparison, []
        if len(c.datasets) > 1:
            shown.append(("All datasets", tables.combined_table(c)))
        # A terminal has room for the main tables only.
        for results in c.datasets:
            name, clients = results.name, f"test {tables.WORDS[c.metric]} of each client"
            shown.append((name, tables.main_table(c, results, brief)))
            if not brief:
                shown.append((f"{name}: other measures", tables.score_table(c, results)))
                shown.append((f"{name}: {clients}", tables.client_scores(c, results)))
                tasks = tables.task_table(results)
                shown += [(f"{name}: tasks", tasks)] if tasks else []
                shown.append((f"{name}: costs per client", tables.cost_table(results)))
        if not brief:
            shown.append(("Settings", tables.settings_table(c)))
        return shown


def compare_runs(
    paths: Sequence[Path], metric: str = "perplexity", baseline: str | None = None
) -> Compared:
    """Read every run in or below `paths` and compare the finished ones.

    baseline: the name of a setting, or the method of only one; None: the sweep's own, else "local"
    where there is one. Raises UserError.
    """
    chosen = metric_named(metric)
    found = find_runs(paths)
    finished = [one for one in found if one.run.finished]
    unfinished = [one.run for one in found if not one.run.finished]
    if not finished:
        go_on = command("resume", unfinished[0].folder)
        raise UserError(f"{unfinished[0].folder}: no run here is finished; go on with: {go_on}")

    # A sweep gives title and baseline only where all runs are its own.
    sweep = found[0].sweep
    if any(one.sweep is not sweep for one in found):
        sweep = None
    datasets = group(finished)
    comparison = compare(datasets, chosen, _baseline(baseline, sweep, datasets))
    title = sweep.name if sweep else f"{f.plural(len(comparison.settings), 'setting')} compared"
    said = notes(comparison, datasets, unfinished)
    if baseline is None and sweep and sweep.baseline and comparison.baseline is None:
        said.insert(0, f'the sweep\'s baseline "{sweep.baseline}" has no finished run here yet')
    return Compared(title, comparison, tuple(said), tuple(remarks(datasets)), tuple(paths))


def _baseline(
    given: str | None, sweep: Sweep | None, datasets: Sequence[Dataset]
) -> Baseline | None:
    """Return the baseline: as given, else the sweep's, else local, which nobody asked for and may
    not be there.
    """
    if given is not None:
        return baseline_named(given, datasets)
    try:
        return baseline_named((sweep and sweep.baseline) or "local", datasets)
    except UserError:
        return None
