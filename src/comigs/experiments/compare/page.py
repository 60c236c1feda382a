"""A comparison as one self-contained HTML page, in the looks of a run's report."""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup

from comigs import text as f
from comigs.experiments.compare import plots, points, tables
from comigs.experiments.compare.compared import Compared
from comigs.experiments.compare.statistics import Comparison, Results, ranks
from comigs.runs.report.page import render
from comigs.text import Table

PLOTS = ("by-round", "by-bytes", "by-parameters")


def comparison_page(compared: Compared) -> str:
    """The page as HTML; equal runs give equal bytes."""
    c = compared.comparison
    return render(
        "compare.html.j2",
        title=compared.title,
        counts=_counts(c),
        headline=headline(c),
        notes=compared.notes,
        remarks=compared.remarks,
        baseline=c.baseline.words if c.baseline else None,
        scale=tables.WORDS[c.scale],
        metric=tables.WORDS[c.metric],
        combined=tables.combined_table(c) if len(c.datasets) > 1 else None,
        parts=[_part(c, results) for results in c.datasets],
        settings=tables.settings_table(c),
        runs=_runs(c),
    )


def headline(c: Comparison) -> str:
    """The result in one sentence."""
    metric = tables.WORDS[c.metric]
    if not c.same_seeds:
        return "Settings were measured on different seeds, so none is called best."
    if len(c.datasets) > 1:
        return _by_rank(ranks(c), len(c.datasets), len(c.settings))
    results = c.datasets[0]
    measured = [
        (score.mean, number)
        for number, row in enumerate(results.rows)
        if (score := row.scores[c.metric])
    ]
    if not measured:
        return "Nothing was measured."
    row = results.rows[min(measured)[1]]
    score, column = row.scores[c.metric], [s for r in results.rows if (s := r.scores[c.metric])]
    assert score is not None
    places = f.places([s.mean for s in column], [s.sd for s in column])
    said = (
        f"Lowest mean test {metric}: {row.setting.name}, {f.spread(score.mean, score.sd, places)}"
    )
    said += f" over {f.plural(score.n, 'seed')}" if score.n > 1 else ", one seed"
    if row.difference is None or row.baseline is None:
        return said + ("; it is a baseline." if row.is_baseline else ".")
    against = f"{f.signed(row.difference.difference.mean, None, 3)} {tables.WORDS[c.scale]} against {row.baseline.name}"
    p = (
        f", p = {f.probability(row.difference.p)}".replace("= <", "< ")
        if row.difference.p is not None
        else ""
    )
    return f"{said}; {against}{p}."


def _by_rank(ranked: Mapping[str, float], datasets: int, settings: int) -> str:
    """Who is best over several datasets, and among how many."""
    if len(ranked) < 2:
        return "Fewer than two settings were measured on all datasets."
    best, *others = sorted(set(ranked.values()))
    first = [name for name, rank in ranked.items() if rank == best]
    said = f"Best mean rank over {datasets} datasets: {f.listed(first)} ({best:.1f})"
    if others:
        said += f", then {f.listed([name for name, rank in ranked.items() if rank == others[0]])} ({others[0]:.1f})"
    among = (
        "" if len(ranked) == settings else f"; of the {len(ranked)} settings that all of them have"
    )
    return f"{said}{among}."


def all_plots(c: Comparison) -> list[plots.Plot]:
    """The three plots, without those that have nothing to show."""
    metric, log = tables.WORDS[c.metric], c.metric == "perplexity"
    made = [
        plots.Plot(PLOTS[0], points.by_round(c), "round", f"valid {metric}", "round", log),
        plots.Plot(PLOTS[1], points.by_bytes(c), "uploaded per client", f"test {metric}", "size"),
        plots.Plot(
            PLOTS[2], points.by_parameters(c), "trained parameters", f"test {metric}", "count"
        ),
    ]
    return [plot for plot in made if plot.panels]


def _part(c: Comparison, results: Results) -> dict[str, object]:
    """What the page shows of one dataset."""
    pictures = [
        (plot.name, Markup(plots.panel_svg(plot, panel)))
        for plot in all_plots(c) for panel in plot.panels if panel.title == results.name
    ]  # fmt: skip
    return {
        "name": results.name,
        "scores": tables.score_table(c, results),
        "main": tables.main_table(c, results),
        "clients": tables.client_scores(c, results),
        "costs": tables.cost_table(results),
        "pictures": pictures,
        "legend": [
            (row.setting.name, *plots.key(c.settings.index(row.setting.name)))
            for row in results.rows
        ],
        "has_baseline": results.has_baseline,
    }


def _runs(c: Comparison) -> Table:
    rows = [
        (results.name, row.setting.name, str(seed), str(run.folder), str(run.environment.get("commit") or f.NONE)[:12])
        for results in c.datasets for row in results.rows for seed, run in row.setting.runs.items()
    ]  # fmt: skip
    return Table(("dataset", "setting", "seed", "folder", "commit"), tuple(rows), names=5)


def _counts(c: Comparison) -> str:
    runs = sum(len(row.setting.runs) for results in c.datasets for row in results.rows)
    return ", ".join([
        f.plural(len(c.settings), "setting"), f.plural(len(c.datasets), "dataset"), f.plural(runs, "run")
    ])  # fmt: skip
