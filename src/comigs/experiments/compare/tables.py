"""This module makes the comparison's tables as rows of text, for the terminal, the page, Markdown
and LaTeX.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from comigs import text as f
from comigs.experiments.compare.costs import Costs
from comigs.experiments.compare.fields import words
from comigs.experiments.compare.settings import Setting
from comigs.experiments.compare.simulated import HOUR, final_valid, hours_to
from comigs.experiments.compare.statistics import (
    Comparison,
    Results,
    mean_difference,
    ranks,
)
from comigs.experiments.compare.t_test import Paired, Spread
from comigs.experiments.compare.task_scores import task_scores
from comigs.experiments.run_data import METRICS, Metric
from comigs.perplexity import LARGEST_EXPONENT
from comigs.text import Table

WORDS = {"perplexity": "perplexity", "nats_per_token": "nats/token", "bits_per_byte": "bits/byte"}
BASE = "untouched base"
REACHED: Metric = "nats_per_token"  # by which one setting is as good as another


@dataclass(frozen=True)
class Column:
    """A column has a header, a cell per row and one for the closing row. values: what the best two
    are found by; low is good.
    """

    header: str
    cells: Sequence[str]
    last: str = ""
    values: Sequence[float | None] = ()


def main_table(comparison: Comparison, results: Results, brief: bool = False) -> Table:
    """Return one row per setting: the score, the difference to the baseline, what it costs. brief:
    without costs.
    """
    rows, metric = results.rows, comparison.metric
    scores = [r.scores[metric] for r in rows]
    columns = [_names(results), Column("seeds", [str(len(r.setting.runs)) for r in rows])]
    columns.append(_scores(f"test {WORDS[metric]}", scores, results.base[metric]))
    if any(r.baseline for r in rows):
        columns += _differences(comparison, results)
    if not brief:
        columns += _costs(results)[:2]
    return _table(columns, results.same_seeds)


def score_table(comparison: Comparison, results: Results) -> Table:
    """Return one row per setting: the measures that the main table does not have."""
    columns = [_names(results)]
    for metric in METRICS:
        if metric != comparison.metric:
            scores = [r.scores[metric] for r in results.rows]
            columns.append(_scores(f"test {WORDS[metric]}", scores, results.base[metric]))
    of_mean = [r.perplexity_of_mean for r in results.rows]
    columns.append(_scores("exp of mean nats/token", of_mean, results.base["perplexity_of_mean"]))
    return _table(columns, results.same_seeds)


def client_scores(comparison: Comparison, results: Results) -> Table:
    """Return one row per setting, one column per client."""
    metric = comparison.metric
    columns = [_names(results)]
    for client in results.clients:
        scores = [r.clients[client][metric] for r in results.rows]
        columns.append(_scores(client, scores, results.base_of[client][metric]))
    return _table(columns, results.same_seeds)


def task_table(results: Results) -> Table | None:
    """Return one row per setting, one column per measure of a task; None where none was asked."""
    measured = task_scores(results)
    columns = [_names(results)]
    for score in measured:
        lower = " (lower is better)" * score.lower_is_better
        header = f"{score.task}: {score.measure}{lower}"
        column = _scores(header, score.settings, score.base)
        columns.append(replace(column, values=()))  # high is good of most, and low of some
    return _table(columns, False) if measured else None


def cost_table(results: Results) -> Table:
    """Return one row per setting: parameters, tokens, bytes, and speed and memory where they were
    recorded.
    """
    columns = [Column("setting", [r.setting.name for r in results.rows]), *_costs(results)]
    for header, name, said in (
        ("tokens per second", "tokens_per_second", f.count),
        ("peak memory", "peak_memory_bytes", f.size),
        ("weights in the merge", "weights", lambda words: words or f.NONE),
        ("simulated time", "simulated_seconds", f.duration),
        ("work lost", "work_lost", f.percent),
    ):
        values = [r.costs[name] for r in results.rows]
        if any(value not in (None, "") for value in values):
            columns.append(Column(header, list(map(said, values))))

    # A setting that is better in the end may have taken longer to be as good as the baseline.
    until = []
    for row in results.rows:
        against = row.setting if row.is_baseline else row.baseline
        goal = None
        if against is not None:
            goal = final_valid(against, REACHED)
        until.append(hours_to(row.setting, REACHED, goal))
    if any(hours is not None for hours in until):
        cells = [f.duration(hours and hours * HOUR) for hours in until]
        columns.append(Column("until the baseline's last valid", cells))
    return _table(columns, False)


def combined_table(comparison: Comparison) -> Table:
    """Return one row per setting, one column per dataset; then its mean rank, and its mean
    difference to the baseline.
    """
    names, metric = comparison.settings, comparison.metric
    columns = [Column("setting", names, BASE)]
    for results in comparison.datasets:
        scores = {row.setting.name: row.scores[metric] for row in results.rows}
        known = [scores.get(name) for name in names]
        columns.append(_scores(results.name, known, results.base[metric]))

    # Ranks compare datasets whose figures are of different size.
    rank = [ranks(comparison).get(name) for name in names]
    cells = [f.spread(value, None, 1) for value in rank]
    columns.append(Column("mean rank", cells, values=rank))
    if comparison.baseline is not None:
        every = [row for results in comparison.datasets for row in results.rows]
        references = {row.setting.name for row in every if row.is_baseline}
        cells = []
        for name in names:
            mean = f.signed(mean_difference(comparison, name), None, 4)
            cells.append("baseline" if name in references else mean)
        columns.append(Column(f"mean difference in {WORDS[comparison.scale]}", cells))
    return _table(columns, comparison.same_seeds)


def settings_table(comparison: Comparison) -> Table:
    """Return what each setting's config says wherever settings of the comparison differ; on any
    dataset (clients.NAME...).
    """
    by_name: dict[str, list[Setting]] = {}
    for results in comparison.datasets:
        for row in results.rows:
            by_name.setdefault(row.setting.name, []).append(row.setting)
    every = [setting for same in by_name.values() for setting in same]
    names = list(dict.fromkeys(n for setting in every for n in setting.fields if n != "method"))

    # One setting may have another value for the clients of each dataset.
    rows = []
    for name, same in by_name.items():
        cells = [name, same[0].method]
        for field in names:
            values = [s.fields[field] for s in same if s.fields.get(field) is not None]
            cells.append(", ".join(dict.fromkeys(map(words, values))) or f.NONE)
        rows.append(tuple(cells))
    return Table(("setting", "method", *names), tuple(rows), names=2)


def perplexity_change(paired: Paired) -> float:
    """Return a difference in nats per token as a fraction of the baseline's perplexity (of the mean
    loss).
    """
    return math.expm1(min(paired.difference.mean, LARGEST_EXPONENT))


def _names(results: Results) -> Column:
    """Return the column that says which setting a row is of."""
    return Column("setting", [r.setting.name for r in results.rows], BASE)


def _differences(comparison: Comparison, results: Results) -> list[Column]:
    """Return the columns of differences to the baseline, over the seeds that both have."""
    rows = results.rows
    known = [r.difference.difference for r in rows if r.difference]
    places = max(3, f.places([s.mean for s in known], [s.sd for s in known]))

    def column(header: str, cell: Callable[[Paired], str]) -> Column:
        cells = [f.NONE] * len(rows)
        for number, row in enumerate(rows):
            if row.difference:
                cells[number] = cell(row.difference)
        return Column(header, cells)

    # The baseline itself has no difference, and says what it is.
    by = column("", lambda d: f.signed(d.difference.mean, d.difference.sd, places)).cells
    marked = ["baseline" * row.is_baseline or cell for row, cell in zip(rows, by, strict=True)]
    columns = [Column(f"{WORDS[comparison.scale]} against baseline", marked)]
    if comparison.scale == "nats_per_token":
        columns.append(column("perplexity change", lambda d: f.change(perplexity_change(d))))
    columns.append(column("p", lambda d: f.probability(d.p)))
    columns.append(column("better in", lambda d: f"{d.better} of {d.pairs}"))
    if any(r.difference and r.difference.difference.n != len(r.setting.runs) for r in rows):
        columns.append(column("common seeds", lambda d: str(d.difference.n)))
    return columns


def _costs(results: Results) -> list[Column]:
    """Return the columns of costs. Trained parameters and uploads are first: the two that belong
    beside every score.
    """
    parameters, tokens = [], []
    for costs in (row.costs for row in results.rows):
        said = _range(costs, "trained_parameters", f.count)
        said += _times(costs["trained_parameters_ratio"])
        if 0 < costs["training_clients"] < costs["clients"]:
            said += f", {round(costs['training_clients'], 1):g} of {costs['clients']} clients"
        parameters.append(said)
        times = _times(costs["trained_tokens_ratio"])
        tokens.append(f.count(costs["trained_tokens"]) + times)

    # What routers learn from is no budget of the experts, and most have no such steps.
    every = [row.costs for row in results.rows]
    columns = [
        Column("trained parameters", parameters),
        Column("upload / round", [_range(c, "uploaded_bytes_per_round", f.size) for c in every]),
        Column(
            "download / round", [_range(c, "downloaded_bytes_per_round", f.size) for c in every]
        ),
        Column("trained tokens", tokens),
    ]
    if any(c["router_tokens"] for c in every):
        columns.append(Column("and in router steps", [f.count(c["router_tokens"]) for c in every]))
    return columns


def _times(ratio: float | None) -> str:
    """Return how many times the baseline's budget, where it is not equal."""
    return "" if ratio is None or ratio == 1 else f" ({f.ratio(ratio)})"


def _range(costs: Costs, name: str, text: Callable[[float | None], str]) -> str:
    """Return the mean, and the least and most where they are told apart."""
    if costs[name] is None:
        return f.NONE
    low, high = text(costs[f"{name}_min"]), text(costs[f"{name}_max"])
    return text(costs[name]) + f" [{low} to {high}]" * (low != high)


def _scores(header: str, spreads: Sequence[Spread | None], base: float | None = None) -> Column:
    """Return a column of scores over seeds, all with the same decimals."""
    known = [s for s in spreads if s]
    places = f.places([s.mean for s in known], [s.sd for s in known])
    cells, values = [], []
    for s in spreads:
        cells.append(f.spread(s.mean, s.sd, places) if s else f.NONE)
        values.append(s.mean if s else None)
    last = "" if base is None else f.spread(base, None, places)
    return Column(header, cells, last, values)


def _table(columns: Sequence[Column], mark: bool) -> Table:
    """Return columns as a table. mark: find the best and second best of each column."""
    best: set[tuple[int, int]] = set()
    second: set[tuple[int, int]] = set()
    for number, column in enumerate(columns):
        # Nobody is the best of one.
        known = [v for v in column.values if v is not None]
        levels = sorted(set(known))[:2] if mark and len(known) > 1 else []
        for row, value in enumerate(column.values):
            if value is not None and value in levels:
                (best if value == levels[0] else second).add((row, number))
    last = tuple(c.last for c in columns)
    return Table(
        headers=tuple(c.header for c in columns),
        rows=tuple(zip(*(c.cells for c in columns), strict=True)),
        last=last if any(last[1:]) else None,
        best=frozenset(best),
        second=frozenset(second),
    )
