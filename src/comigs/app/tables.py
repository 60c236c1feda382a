"""This module prints tables so that names, numbers and words stay whole, however wide the terminal.

A table that is too wide is shown as a block for each of its rows. What is no terminal has no width
unless COLUMNS says one, and gets a line for each row.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

if TYPE_CHECKING:
    from comigs.text import Table

GAP = 3  # columns that a table spends on each of its columns, beside what is in it
INDENT = "  "


def show_table(out: Console, table: Table, title: str | None = None) -> None:
    """Show a table with its closing row, words to the left and numbers to the right."""
    rows = [*table.rows, *([table.last] if table.last else [])]
    columns = zip(*[[""] * len(table.headers), *rows], strict=True)
    cells = [max(map(cell_len, column)) for column in columns]
    widths = [max(c, cell_len(h)) for c, h in zip(cells, table.headers, strict=True)]

    # a file or a program is no page that could be too narrow
    if _has_width(out):
        room = out.width - GAP * len(widths)
        narrowed = _narrowed(widths, _least(table, cells), room)
        if narrowed is None:
            _show_blocks(out, table, title)
            return
        widths = narrowed
    _show_rows(out, table, title, widths)


def _has_width(out: Console) -> bool:
    """Return whether what is printed to has a width."""
    return out.is_terminal or os.environ.get("COLUMNS", "").isdigit()


def _least(table: Table, cells: list[int]) -> list[int]:
    """Return the least width of each column: its cells stay whole, and the words of its header."""
    least = []
    for cell, header in zip(cells, table.headers, strict=True):
        least.append(max([cell, *map(cell_len, header.split())]))
    return least


def _narrowed(widths: list[int], least: list[int], room: int) -> list[int] | None:
    """Return widths that fit, the longest headers cut into lines first; None where none do."""
    if sum(least) > room:
        return None
    narrowed = list(widths)
    while sum(narrowed) > room:
        wide = [n for n in range(len(narrowed)) if narrowed[n] > least[n]]
        narrowed[max(wide, key=lambda n: narrowed[n])] -= 1
    return narrowed


def _show_rows(out: Console, table: Table, title: str | None, widths: list[int]) -> None:
    """Show a line for each row."""
    shown = RichTable(
        title=title,
        title_justify="left",
        title_style="bold",
        show_footer=table.last is not None,
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1),
    )
    footers = table.last or ("",) * len(table.headers)
    for number, (header, footer) in enumerate(zip(table.headers, footers, strict=True)):
        side = "left" if number < table.names else "right"
        shown.add_column(
            Text("\n".join(_lines(header, widths[number]))),
            Text(footer),
            justify=side,  # type: ignore[arg-type]
            no_wrap=True,
            min_width=widths[number],
        )
    for number, row in enumerate(table.rows):
        styles = [_style(table, number, column) for column in range(len(row))]
        shown.add_row(*map(Text, row, styles))

    # as wide as it is, where it goes to no terminal
    if not _has_width(out):
        width = max(sum(widths) + GAP * len(widths), cell_len(title or ""))
        out = Console(file=out.file, width=width, highlight=False)
    out.print(shown)


def _show_blocks(out: Console, table: Table, title: str | None) -> None:
    """Show a block for each row: its name, and below it a line for each other column."""
    if title is not None:
        out.print(Text(title, "bold"), soft_wrap=True)
    rows = dict(enumerate(table.rows))
    if table.last is not None:
        rows[len(rows)] = table.last
    side = max(map(cell_len, table.headers[1:]), default=0)
    beside = 2 * side <= out.width  # else each header has a line of its own
    room = out.width - 2 * len(INDENT) - beside * side

    # what is not said of a row takes no line
    for number, row in rows.items():
        out.print()
        out.print(Text(row[0], "bold"), soft_wrap=True)
        for column, (header, cell) in enumerate(zip(table.headers, row, strict=True)):
            if column == 0 or not cell:
                continue
            start = INDENT + header + " " * (side - cell_len(header)) + INDENT
            if not beside:
                out.print(Text(INDENT + header), soft_wrap=True)
                start = 2 * INDENT
            for line in _lines(cell, room):
                shown = Text(start).append(line, _style(table, number, column))
                out.print(shown, soft_wrap=True)
                start = " " * cell_len(start)
    out.print()


def _style(table: Table, row: int, column: int) -> str:
    if (row, column) in table.second:
        return "underline"
    return "bold" if (row, column) in table.best else ""


def _lines(text: str, width: int) -> list[str]:
    """Return a text in lines of at most this width, cut between words only."""
    lines: list[str] = []
    for word in text.split(" "):
        if lines and cell_len(lines[-1]) + 1 + cell_len(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
