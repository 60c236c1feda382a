"""This module writes the comparison as text: Markdown, LaTeX (booktabs) and CSV."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from comigs.experiments.compare.statistics import Comparison, Results, Row
from comigs.experiments.compare.t_test import Spread
from comigs.experiments.compare.tables import perplexity_change
from comigs.experiments.csv_file import Row as Line
from comigs.experiments.csv_file import to_csv
from comigs.experiments.run_data import METRICS
from comigs.text import Table, one_line

TEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"$<$",
    ">": r"$>$",
    "[": "{[}",
    "]": "{]}",
    "\N{PLUS-MINUS SIGN}": r"$\pm$",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "\N{EN DASH}": "--",
}
MARKS = "Best **bold**, second best *italic*."


def markdown(title: str, parts: Sequence[tuple[str, Table]], notes: Sequence[str]) -> str:
    """Return the whole Markdown file: what to know first, then each table under its name."""
    listed = "".join(f"- {_plain(note)}\n" for note in notes)
    tables = "".join(f"\n## {_plain(name)}\n\n{markdown_table(table)}" for name, table in parts)
    return f"# {_plain(title)}\n\n{listed}{tables}\n{MARKS}\n"


def markdown_table(table: Table) -> str:
    """Return a table with the best bold and the second best italic."""
    numbers = len(table.headers) - table.names
    lines = [list(map(_plain, table.headers)), ["---"] * table.names + ["---:"] * numbers]
    for r, row in enumerate(table.rows):
        cells = []
        for c, cell in enumerate(row):
            mark = "**" * ((r, c) in table.best) or "*" * ((r, c) in table.second)
            cells.append(f"{mark}{_plain(cell)}{mark}")
        lines.append(cells)
    if table.last:
        lines.append(list(map(_plain, table.last)))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def latex_table(table: Table, caption: str, label: str) -> str:
    """Return a floating table in booktabs, the best bold, the second best underlined."""
    body = []
    for r, row in enumerate(table.rows):
        cells = list(map(tex, row))
        for c, cell in enumerate(cells):
            if (r, c) in table.best:
                cells[c] = rf"\textbf{{{cell}}}"
            elif (r, c) in table.second:
                cells[c] = rf"\underline{{{cell}}}"
        body.append(" & ".join(cells) + r" \\")
    if table.last:
        body += [r"\midrule", " & ".join(map(tex, table.last)) + r" \\"]

    # A label is a word: only letters, digits and hyphens.
    word = re.sub(r"[^A-Za-z0-9]+", "-", label).strip("-").lower()
    columns = "l" * table.names + "r" * (len(table.headers) - table.names)
    lines = [r"\begin{table}[t]", r"\centering", rf"\caption{{{tex(caption)}}}"]
    lines += [rf"\label{{tab:{word}}}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
    lines += [" & ".join(map(tex, table.headers)) + r" \\", r"\midrule", *body, r"\bottomrule"]
    return "\n".join([*lines, r"\end{tabular}", r"\end{table}", ""])


def tex(text: str) -> str:
    """Return any text as LaTeX shows it; a minus before a digit is a minus."""
    escaped = "".join(TEX.get(c, c) for c in one_line(text))
    return re.sub(r"(?<![\w.])([-+])(?=\d)", r"$\1$", escaped)


def settings_csv(comparison: Comparison) -> str:
    """Return one row per setting and dataset, full precision; empty: not measured."""
    lines = []
    for results in comparison.datasets:
        lines += [_setting(comparison, results, row) for row in results.rows]
    return to_csv(lines)


def runs_csv(comparison: Comparison) -> str:
    """Return one row per run and client, full precision; bytes and tokens are of the whole run."""
    lines = []
    for results in comparison.datasets:
        for row in results.rows:
            for run in row.setting.runs.values():
                head = _head(results, row) | {"seed": run.config.seed}
                folder = {"folder": str(run.folder)}
                lines += [head | _client(folder, client) for client in run.clients]
    return to_csv(lines)


def _head(results: Results, row: Row) -> Line:
    """Return what a line is about."""
    setting = row.setting
    return {"dataset": results.name, "setting": setting.name, "method": setting.method}


def _setting(comparison: Comparison, results: Results, row: Row) -> Line:
    """Return the line of a setting: its scores, differences, costs and fields."""
    line = _head(results, row) | {"seeds": " ".join(map(str, row.setting.runs))}
    for metric in METRICS:
        line |= _spread(f"test_{metric}", row.scores[metric])
    line |= _spread("test_perplexity_of_mean", row.perplexity_of_mean)
    line["baseline"] = row.baseline and row.baseline.name
    line |= _difference(comparison, row) | row.costs
    return line | {name: value for name, value in row.setting.fields.items() if name != "method"}


def _difference(comparison: Comparison, row: Row) -> Line:
    """Return the cells of a difference to the baseline, all empty where there is none."""
    d = row.difference
    if d is None:
        names = ("common_seeds", "perplexity_change", "p", "better_pairs", "pairs")
        empty = {"difference_in": None, **_spread("difference", None)}
        return empty | dict.fromkeys(names)
    in_nats = comparison.scale == "nats_per_token"
    return {
        "difference_in": comparison.scale,
        **_spread("difference", d.difference),
        "common_seeds": d.difference.n,
        "perplexity_change": perplexity_change(d) if in_nats else None,
        "p": d.p,
        "better_pairs": d.better,
        "pairs": d.pairs,
    }


def _client(head: Line, row: Line) -> Line:
    """Return the cells of one client of a run."""
    line = {"client": row["client"], **head}
    for which in ("test", "base_test"):
        line |= {f"{which}_{metric}": row[f"{which}_{metric}"] for metric in METRICS}
    for name in ("test_tokens", "trained_parameters", "trained_tokens", "router_tokens"):
        line[name] = row[name]
    return line | {name: row[name] for name in ("uploaded_bytes", "downloaded_bytes")}


def _spread(name: str, value: Spread | None) -> dict[str, Any]:
    """Return the cells of a mean over seeds."""
    if value is None:
        return {f"{name}_mean": None, f"{name}_sd": None}
    return {f"{name}_mean": value.mean, f"{name}_sd": value.sd}


def _plain(cell: str) -> str:
    """Return any text as Markdown shows it."""
    return re.sub(r"([|*_`<\\]|\[(?=[^\[\]]*\]\())", r"\\\1", one_line(cell))
