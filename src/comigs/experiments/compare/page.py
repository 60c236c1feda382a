"""This module makes a comparison one self-contained HTML page, in the looks of a run's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from comigs import text as f
from comigs.experiments.compare import plots, tables
from comigs.experiments.compare.compared import Compared
from comigs.experiments.compare.statistics import Comparison, Results, ranks
from comigs.runs.report.page import render
from comigs.text import Table


def comparison_page(compared: Compared, drawn: Sequence[plots.Plot]) -> str:
    """Return the page as HTML, with the plots that were made of it; equal runs give equal bytes."""
    # The template only places things: every figure is text by now.
    c = compared.comparison
    return render(
        "compare.html.j2",
        Path(__file__).parent,
        title=compared.title,
        counts=_counts(c),
        headline=headline(c),
        notes=compared.notes,
        remarks=compared.remarks,
        baseline=c.baseline and c.baseline.words,
        scale=tables.WORDS[c.scale],
        metric=tables.WORDS[c.metric],
        combined=tables.combined_table(c) if len(c.datasets) > 1 else None,
        parts=[_part(c, results, drawn) for results in c.datasets],
        settings=tables.settings_table(c),
        runs=_runs(c),
    )


def headline(c: Comparison) -> str:
    """Return the result in one sentence."""
    if not c.same_seeds:
        return "Settings were measured on different seeds, so none is called best."
    if len(c.datasets) > 1:
        return _by_rank(ranks(c), len(c.datasets), len(c.settings))
    rows = c.datasets[0].rows
    scores = [score for row in rows if (score := row.scores[c.metric])]
    if not scores:
        return "Nothing was measured."

    # The best one, with as many decimals as its column of the table.
    score = min(scores, key=lambda s: s.mean)
    row = next(row for row in rows if row.scores[c.metric] is score)
    places = f.places([s.mean for s in scores], [s.sd for s in scores])
    best = f"{row.setting.name}, {f.spread(score.mean, score.sd, places)}"
    said = f"Lowest mean test {tables.WORDS[c.metric]}: {best}"
    said += f" over {f.plural(score.n, 'seed')}" if score.n > 1 else ", one seed"

    # How far it is from the baseline, and whether that may be chance.
    if row.difference is None or row.baseline is None:
        return f"{said}; it is a baseline." if row.is_baseline else f"{said}."
    by = f.signed(row.difference.difference.mean, None, 3)
    said += f"; {by} {tables.WORDS[c.scale]} against {row.baseline.name}"
    if row.difference.p is not None:
        said += f", p = {f.probability(row.difference.p)}".replace("= <", "< ")
    return f"{said}."


def _by_rank(ranked: Mapping[str, float], datasets: int, settings: int) -> str:
    """Return who is best over several datasets, and among how many."""
    if len(ranked) < 2:
        return "Fewer than two settings were measured on all datasets."
    best, *others = sorted(set(ranked.values()))
    first = [name for name, rank in ranked.items() if rank == best]
    said = f"Best mean rank over {datasets} datasets: {f.listed(first)} ({best:.1f})"
    if others:
        second = [name for name, rank in ranked.items() if rank == others[0]]
        said += f", then {f.listed(second)} ({others[0]:.1f})"
    if len(ranked) < settings:
        said += f"; of the {len(ranked)} settings that all of them have"
    return f"{said}."


def _part(c: Comparison, results: Results, drawn: Sequence[plots.Plot]) -> dict[str, object]:
    """Return what the page shows of one dataset."""
    # A plot has a panel for each dataset that has something to draw.
    pictures = []
    for plot in drawn:
        own = [panel for panel in plot.panels if panel.title == results.name]
        pictures += [(plot.name, Markup(plots.panel_svg(plot, panel))) for panel in own]
    names = [row.setting.name for row in results.rows]
    return {
        "name": results.name,
        "scores": tables.score_table(c, results),
        "main": tables.main_table(c, results),
        "clients": tables.client_scores(c, results),
        "tasks": tables.task_table(results),
        "costs": tables.cost_table(results),
        "pictures": pictures,
        "legend": [(name, *plots.key(c.settings.index(name))) for name in names],
        "has_baseline": results.has_baseline,
    }


def _runs(c: Comparison) -> Table:
    """Return a table of all runs, and where they are."""
    rows = []
    for results in c.datasets:
        for row in results.rows:
            for seed, run in row.setting.runs.items():
                commit = str(run.environment.get("commit") or f.NONE)[:12]
                rows.append((results.name, row.setting.name, str(seed), str(run.folder), commit))
    return Table(("dataset", "setting", "seed", "folder", "commit"), tuple(rows), names=5)


def _counts(c: Comparison) -> str:
    """Return how much is compared."""
    rows = [row for results in c.datasets for row in results.rows]
    runs = sum(len(row.setting.runs) for row in rows)
    kinds = ((len(c.settings), "setting"), (len(c.datasets), "dataset"), (runs, "run"))
    return ", ".join(f.plural(*kind) for kind in kinds)
