"""The comparison as text files: Markdown, LaTeX (booktabs) and CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

from comigs.experiments.compare.costs import Costs, Range, ratio
from comigs.experiments.compare.statistics import METRICS, Comparison, Results, Row
from comigs.experiments.compare.stats import Spread
from comigs.experiments.compare.tables import perplexity_change
from comigs.text import Table

_TEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$", "[": "{[}", "]": "{]}",
    "\N{PLUS-MINUS SIGN}": r"$\pm$", "\N{MULTIPLICATION SIGN}": r"$\times$", "\N{EN DASH}": "--",
}  # fmt: skip
MARKS = "Best **bold**, second best *italic*."


def markdown_table(table: Table) -> str:
    """With the best bold and the second best italic."""
    align = ["---" if i < table.names else "---:" for i in range(len(table.headers))]
    rows = [
        [_marked(cell, (r, c), table) for c, cell in enumerate(row)]
        for r, row in enumerate(table.rows)
    ]
    closing = [[_plain(cell) for cell in table.last]] if table.last else []
    lines = [[_plain(h) for h in table.headers], align, *rows, *closing]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def latex_table(table: Table, caption: str, label: str) -> str:
    """A floating table in booktabs, the best bold, the second best underlined."""
    rows = [
        " & ".join(_tex_cell(cell, (r, c), table) for c, cell in enumerate(row))
        for r, row in enumerate(table.rows)
    ]
    body = [*(f"{row} \\\\" for row in rows)]
    if table.last:
        body += [r"\midrule", " & ".join(map(tex, table.last)) + r" \\"]
    return "\n".join([
        r"\begin{table}[t]", r"\centering", rf"\caption{{{tex(caption)}}}",
        rf"\label{{tab:{re.sub(r'[^A-Za-z0-9]+', '-', label).strip('-').lower()}}}",
        rf"\begin{{tabular}}{{{'l' * table.names}{'r' * (len(table.headers) - table.names)}}}", r"\toprule",
        " & ".join(map(tex, table.headers)) + r" \\", r"\midrule", *body, r"\bottomrule", r"\end{tabular}",
        r"\end{table}", "",
    ])  # fmt: skip


def tex(text: str) -> str:
    """Any text as LaTeX shows it; a minus before a digit is a minus."""
    escaped = "".join(_TEX.get(c, c) for c in text)
    return re.sub(r"(?<![\w.])([-+])(?=\d)", r"$\1$", escaped)


def settings_csv(comparison: Comparison) -> str:
    """One row per setting and dataset, full precision; empty: not measured."""
    return _csv(
        _setting_row(comparison, results, row)
        for results in comparison.datasets
        for row in results.rows
    )


def runs_csv(comparison: Comparison) -> str:
    """One row per run and client, full precision; bytes and tokens are of the whole run."""
    return _csv(
        line
        for results in comparison.datasets
        for row in results.rows
        for line in _run_rows(results, row)
    )


def _setting_row(comparison: Comparison, results: Results, row: Row) -> dict[str, Any]:
    line: dict[str, Any] = {
        "dataset": results.name,
        "setting": row.setting.name,
        "method": row.setting.method,
    }
    line["seeds"] = " ".join(map(str, row.setting.runs))
    for metric in METRICS:
        line |= _spread(f"test_{metric}", row.scores[metric])
    line |= _spread("test_perplexity_of_mean", row.perplexity_of_mean)
    line["baseline"] = row.baseline.name if row.baseline else None
    line |= _difference(comparison, row) | _costs(row.costs, row.baseline_costs)
    return line | {name: value for name, value in row.setting.fields.items() if name != "method"}


def _difference(comparison: Comparison, row: Row) -> dict[str, Any]:
    d = row.difference
    in_nats = comparison.scale == "nats_per_token"
    return {
        "difference_in": comparison.scale if d else None,
        **_spread("difference", d.difference if d else None),
        "common_seeds": d.difference.n if d else None,
        "perplexity_change": perplexity_change(d) if d and in_nats else None,
        "p": d.p if d else None,
        "better_pairs": d.better if d else None,
        "pairs": d.pairs if d else None,
    }


def _costs(costs: Costs, baseline: Costs | None) -> dict[str, Any]:
    """ratio: to the baseline's."""
    return {
        **_range("trained_parameters", costs.trained_parameters),
        "trained_parameters_ratio": ratio(
            costs.parameters, baseline.parameters if baseline else None
        ),
        "training_clients": costs.training,
        "clients": costs.clients,
        "trained_tokens": costs.trained_tokens,
        "trained_tokens_ratio": ratio(
            costs.trained_tokens, baseline.trained_tokens if baseline else None
        ),
        "router_tokens": costs.router_tokens,
        **_range("uploaded_bytes_per_round", costs.uploaded),
        **_range("downloaded_bytes_per_round", costs.downloaded),
        "tokens_per_second": costs.tokens_per_second,
        "peak_memory_bytes": costs.peak_memory_bytes,
        "weights": costs.weights,
    }


def _run_rows(results: Results, row: Row) -> Iterable[dict[str, Any]]:
    for seed, run in row.setting.runs.items():
        for name, client in run.summary.clients.items() if run.summary else ():
            line: dict[str, Any] = {
                "dataset": results.name,
                "setting": row.setting.name,
                "method": row.setting.method,
            }
            line |= {"seed": seed, "client": name, "folder": str(run.folder)}
            for which, score in (("test", client.test), ("base_test", client.base_test)):
                line |= {f"{which}_{metric}": getattr(score, metric) for metric in METRICS}
            line["test_tokens"] = client.test.tokens
            line["trained_parameters"] = client.trained_parameters
            trained = [t for t in run.train if t.client == name]
            line["trained_tokens"] = sum(t.trained_tokens for t in trained)
            line["router_tokens"] = sum(t.router_tokens for t in trained)
            yield line | {
                "uploaded_bytes": client.uploaded_bytes,
                "downloaded_bytes": client.downloaded_bytes,
            }


def _csv(rows: Iterable[dict[str, Any]]) -> str:
    lines = list(rows)
    file = io.StringIO()
    writer = csv.DictWriter(
        file, list(dict.fromkeys(name for line in lines for name in line)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


def _spread(name: str, value: Spread | None) -> dict[str, Any]:
    return {
        f"{name}_mean": value.mean if value else None,
        f"{name}_sd": value.sd if value else None,
    }


def _range(name: str, value: Range | None) -> dict[str, Any]:
    return (
        {name: value.mean, f"{name}_min": value.low, f"{name}_max": value.high}
        if value
        else {name: None}
    )


def _plain(cell: str) -> str:
    return re.sub(r"([|*_`<\\])", r"\\\1", cell)


def _marked(cell: str, place: tuple[int, int], table: Table) -> str:
    mark = "**" if place in table.best else "*" if place in table.second else ""
    return f"{mark}{_plain(cell)}{mark}"


def _tex_cell(cell: str, place: tuple[int, int], table: Table) -> str:
    mark = (
        r"\textbf{%s}"
        if place in table.best
        else r"\underline{%s}"
        if place in table.second
        else "%s"
    )
    return mark % tex(cell)


def markdown(title: str, parts: Sequence[tuple[str, Table]], notes: Sequence[str]) -> str:
    """The whole file: what to know first, then each table under its name."""
    listed = "".join(f"- {_plain(note)}\n" for note in notes)
    tables = "".join(f"\n## {_plain(name)}\n\n{markdown_table(table)}" for name, table in parts)
    return f"# {_plain(title)}\n\n{listed}{tables}\n{MARKS}\n"
