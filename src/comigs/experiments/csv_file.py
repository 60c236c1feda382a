"""This module writes and reads CSV text. A spreadsheet opens it without running what a cell says,
and reading it gives back what was written.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from comigs.errors import UserError

Row = dict[str, Any]  # a cell by the name of its column; None: nothing was measured

FORMULA = (
    "=",
    "+",
    "-",
    "@",
    "\t",
    "\r",
    "\uff1d",
    "\uff0b",
    "\uff0d",
    "\uff20",
)  # what a cell that is computed begins with
WORDS = {int: "a whole number", float: "a number", str: "a text"}


def to_csv(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows as CSV. Columns come in the order in which rows first have them.

    Numbers keep their full precision, and None is an empty cell. A text that a spreadsheet would
    take for a formula gets an apostrophe in front.
    """
    names: dict[str, None] = {}
    lines = []
    for row in rows:
        names.update(dict.fromkeys(row))
        lines.append({name: _safe(value) for name, value in row.items()})
    file = io.StringIO()
    writer = csv.DictWriter(file, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


def from_csv(
    path: Path,
    text: str,
    columns: Mapping[str, type],
    required: Iterable[str],
    later: Iterable[str] = (),
) -> list[Row]:
    """Return the rows of a CSV text with the given columns: str, int or float, None where empty.

    Columns that are not asked for are left out, and those that came `later` than a file was written
    are empty where it has none of them. Raises UserError that names `path`, the line and
    the column where one is missing, a cell is no number, or a required cell is empty.
    """
    # The csv module finds what is no CSV only while it reads.
    reader = csv.DictReader(io.StringIO(text), strict=True)
    rows = []
    try:
        missing = [name for name in columns if name not in (reader.fieldnames or ())]
        if refused := [name for name in missing if name not in later]:
            raise UserError(f"{path}: column {refused[0]}: missing")
        for cells in reader:
            where = f"{path}: line {reader.line_num}: column"
            if None in cells:
                raise UserError(f"{where} {len(cells)}: more cells than the first line names")
            cells |= dict.fromkeys(missing, "")
            rows.append({name: _value(where, name, cells[name], columns[name]) for name in columns})
            empty = [name for name in required if rows[-1][name] is None]
            if empty:
                raise UserError(f"{where} {empty[0]}: empty; must be {WORDS[columns[empty[0]]]}")
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num}: not CSV: {error}") from None
    return rows


def _safe(value: Any) -> Any:
    """Return a cell that no spreadsheet runs; `_value` takes the apostrophe away again."""
    if not isinstance(value, str) or len(value) < 2 or not value.startswith((*FORMULA, "'")):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def _value(where: str, name: str, cell: str | None, kind: type) -> Any:
    """Return a cell as its column's kind. Raises UserError."""
    if not cell:
        return None
    if kind is str:
        return cell[1:] if len(cell) > 1 and cell[0] == "'" else cell
    try:
        value = kind(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f'{where} {name}: "{cell}" is no {WORDS[kind].removeprefix("a ")}')
    return value
