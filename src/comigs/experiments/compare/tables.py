"""The comparison's tables as rows of text, for the terminal, the page, Markdown and LaTeX."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from comigs import text as f
from comigs.experiments.compare.costs import Range, ratio
from comigs.experiments.compare.settings import Setting, words
from comigs.experiments.compare.statistics import (
    METRICS,
    Comparison,
    Results,
    Row,
    mean_difference,
    ranks,
)
from comigs.experiments.compare.stats import Paired, Spread
from comigs.text import Table

WORDS = {"perplexity": "perplexity", "nats_per_token": "nats/token", "bits_per_byte": "bits/byte"}
BASE = "untouched base"


@dataclass(frozen=True)
class Column:
    """A header, a cell per row and one for the closing row. values: what the best two are found by;
    low is good.
    """

    header: str
    cells: Sequence[str]
    last: str = ""
    values: Sequence[float | None] = ()


def main_table(comparison: Comparison, results: Results, brief: bool = False) -> Table:
    """One row per setting: the score, the difference to the baseline, what it costs. brief: without
    costs.
    """
    rows, metric = results.rows, comparison.metric
    columns = [Column("setting", [r.setting.name for r in rows], BASE)]
    columns.append(Column("seeds", [str(len(r.setting.runs)) for r in rows]))
    columns.append(
        _scores(
            f"test {WORDS[metric]}", [r.scores[metric] for r in rows], getattr(results.base, metric)
        )
    )
    if any(r.baseline for r in rows):
        columns += _differences(comparison, results)
    return _table(columns if brief else [*columns, *_costs(results)[:2]], results.same_seeds)


def score_table(comparison: Comparison, results: Results) -> Table:
    """One row per setting: the measures that the main table does not have."""
    rows, base = results.rows, results.base
    columns = [Column("setting", [r.setting.name for r in rows], BASE)]
    columns += [
        _scores(f"test {WORDS[metric]}", [r.scores[metric] for r in rows], getattr(base, metric))
        for metric in METRICS
        if metric != comparison.metric
    ]
    columns.append(
        _scores(
            "exp of mean nats/token", [r.perplexity_of_mean for r in rows], base.perplexity_of_mean
        )
    )
    return _table(columns, results.same_seeds)


def client_scores(comparison: Comparison, results: Results) -> Table:
    """One row per setting, one column per client."""
    columns = [Column("setting", [r.setting.name for r in results.rows], BASE)]
    for client in results.clients:
        base = getattr(results.base_of[client], comparison.metric)
        columns.append(
            _scores(client, [r.clients[client][comparison.metric] for r in results.rows], base)
        )
    return _table(columns, results.same_seeds)


def cost_table(results: Results) -> Table:
    """One row per setting: parameters, tokens, bytes, and speed and memory where they were
    recorded.
    """
    costs = [r.costs for r in results.rows]
    columns = [Column("setting", [r.setting.name for r in results.rows]), *_costs(results)]
    if any(c.tokens_per_second for c in costs):
        columns.append(Column("tokens per second", [f.count(c.tokens_per_second) for c in costs]))
    if any(c.peak_memory_bytes for c in costs):
        columns.append(Column("peak memory", [f.size(c.peak_memory_bytes) for c in costs]))
    if any(c.weights for c in costs):
        columns.append(Column("weights in the merge", [c.weights or f.NONE for c in costs]))
    return _table(columns, False)


def combined_table(comparison: Comparison) -> Table:
    """One row per setting, one column per dataset; then its mean rank, and its mean difference to
    the baseline.
    """
    names, metric = comparison.settings, comparison.metric
    columns = [Column("setting", names, BASE)]
    for results in comparison.datasets:
        rows = [results.row(name) for name in names]
        columns.append(
            _scores(
                results.name,
                [r.scores[metric] if r else None for r in rows],
                getattr(results.base, metric),
            )
        )
    rank = [ranks(comparison).get(name) for name in names]
    columns.append(
        Column("mean rank", [f.NONE if r is None else f"{r:.1f}" for r in rank], values=rank)
    )
    if comparison.baseline is not None:
        means = [mean_difference(comparison, name) for name in names]
        references = {r.setting.name for d in comparison.datasets for r in d.rows if r.is_baseline}
        cells = [
            "baseline" if name in references else f.signed(mean, None, 4)
            for name, mean in zip(names, means, strict=True)
        ]
        columns.append(Column(f"mean difference in {WORDS[comparison.scale]}", cells))
    return _table(columns, comparison.same_seeds)


def settings_table(comparison: Comparison) -> Table:
    """What each setting's config says wherever settings of the comparison differ; on any dataset
    (clients.NAME...).
    """
    by_name: dict[str, list[Setting]] = {}
    for results in comparison.datasets:
        for row in results.rows:
            by_name.setdefault(row.setting.name, []).append(row.setting)
    names = list(
        dict.fromkeys(
            n for same in by_name.values() for s in same for n in s.fields if n != "method"
        )
    )
    rows = [
        (name, same[0].method, *(_said(same, n) for n in names)) for name, same in by_name.items()
    ]
    return Table(("setting", "method", *names), tuple(rows), names=2)


def _said(same: Sequence[Setting], name: str) -> str:
    known = dict.fromkeys(words(s.fields[name]) for s in same if s.fields.get(name) is not None)
    return ", ".join(known) or f.NONE


def _differences(comparison: Comparison, results: Results) -> list[Column]:
    """To the baseline, over the seeds that both have."""
    rows = results.rows
    spreads = [r.difference.difference if r.difference else None for r in rows]
    known = [s for s in spreads if s]
    places = max(3, f.places([s.mean for s in known], [s.sd for s in known])) if known else 3

    def column(header: str, cell: Callable[[Paired], str]) -> Column:
        return Column(header, [cell(r.difference) if r.difference else f.NONE for r in rows])

    cells = ["baseline" if r.is_baseline else _signed(r, places) for r in rows]
    columns = [
        Column(f"{WORDS[comparison.scale]} against baseline", cells),
        column("p", lambda d: f.probability(d.p)),
        column("better in", lambda d: f"{d.better} of {d.pairs}"),
    ]
    if comparison.scale == "nats_per_token":
        columns.insert(1, column("perplexity change", lambda d: f.change(perplexity_change(d))))
    if any(r.difference and r.difference.difference.n != len(r.setting.runs) for r in rows):
        columns.append(column("common seeds", lambda d: str(d.difference.n)))
    return columns


def perplexity_change(paired: Paired) -> float:
    """A difference in nats per token as a fraction of the baseline's perplexity (of the mean
    loss).
    """
    return math.expm1(min(paired.difference.mean, 700))


def _costs(results: Results) -> list[Column]:
    """Trained parameters and uploads first: the two that belong beside every score."""
    costs = [r.costs for r in results.rows]
    budgets = [r.baseline_costs for r in results.rows]
    parameters = [
        _range(c.trained_parameters, f.count)
        + _against(c.parameters, b.parameters if b else None)
        + (f", {c.training} of {c.clients} clients" if 0 < c.training < c.clients else "")
        for c, b in zip(costs, budgets, strict=True)
    ]
    tokens = [
        f.count(c.trained_tokens) + _against(c.trained_tokens, b.trained_tokens if b else None)
        for c, b in zip(costs, budgets, strict=True)
    ]
    columns = [
        Column("trained parameters", parameters),
        Column("upload / round", [_range(c.uploaded, f.size) for c in costs]),
        Column("download / round", [_range(c.downloaded, f.size) for c in costs]),
        Column("trained tokens", tokens),
    ]
    if any(c.router_tokens for c in costs):
        columns.append(Column("and in router steps", [f.count(c.router_tokens) for c in costs]))
    return columns


def _against(value: float | None, reference: float | None) -> str:
    """How many times the baseline's budget, where it is not equal."""
    times = ratio(value, reference)
    return "" if times is None or times == 1 else f" ({f.ratio(times)})"


def _range(values: Range | None, text: Callable[[float | None], str]) -> str:
    """The mean, and the least and most where they are told apart."""
    if values is None:
        return f.NONE
    low, high = text(values.low), text(values.high)
    return text(values.mean) + (f" [{low} to {high}]" if low != high else "")


def _scores(header: str, spreads: Sequence[Spread | None], base: float | None = None) -> Column:
    known = [s for s in spreads if s]
    places = f.places([s.mean for s in known], [s.sd for s in known])
    cells = [f.spread(s.mean, s.sd, places) if s else f.NONE for s in spreads]
    return Column(
        header,
        cells,
        "" if base is None else f.spread(base, None, places),
        [s.mean if s else None for s in spreads],
    )


def _signed(row: Row, places: int) -> str:
    difference = row.difference.difference if row.difference else None
    return f.signed(difference.mean, difference.sd, places) if difference else f.NONE


def _table(columns: Sequence[Column], mark: bool) -> Table:
    best: set[tuple[int, int]] = set()
    second: set[tuple[int, int]] = set()
    for number, column in enumerate(columns):
        levels = (
            sorted({v for v in column.values if v is not None})
            if mark and len(column.values) > 1
            else []
        )
        for row, value in enumerate(column.values):
            if value is not None and value in levels[:2]:
                (best if value == levels[0] else second).add((row, number))
    last = tuple(c.last for c in columns)
    return Table(
        headers=tuple(c.header for c in columns),
        rows=tuple(zip(*(c.cells for c in columns), strict=True)),
        last=last if any(last[1:]) else None,
        best=frozenset(best),
        second=frozenset(second),
    )
