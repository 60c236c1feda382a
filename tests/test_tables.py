"""Names, numbers and words of a table stay whole, in terminals of any width and in pipes."""

from __future__ import annotations

import io
import random
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from comigs.app import api, inventory
from comigs.app.cli_personal import evaluation_table
from comigs.app.tables import show_table
from comigs.runs.report.read import read_run
from comigs.runs.report.tables import client_table
from comigs.text import Table
from tests.runs import finished

WIDTHS = (60, 66, 72, 80)


@pytest.fixture(autouse=True)
def no_width(monkeypatch):
    """Line editing, once loaded, and other tests say how wide this terminal is."""
    monkeypatch.delenv("COLUMNS", raising=False)


def tables():
    """Return the tables that commands show."""
    shown = dict(inventory.inventory())
    run = finished() / "run"
    shown["clients"] = client_table(read_run(run), brief=True)
    shown["evaluation"] = evaluation_table(api.evaluate(run), "test")
    return shown


def random_table(seed):
    """Return a table of any size, with words of other alphabets and long names."""
    rng = random.Random(seed)
    words = [
        "a",
        "expert",
        "x" * 40,
        "Größe",
        "名前",
        "958.5 kB",
        "9.53 ± 0.20",
        "-",
        "[red]",
        "x-y",
    ]
    columns = rng.randint(1, 9)

    def cell():
        return " ".join(rng.choice(words) for _ in range(rng.randint(1, 6)))

    rows = [tuple(f"r{r}c{c} {cell()}" for c in range(columns)) for r in range(rng.randint(0, 5))]
    last = tuple(cell() for _ in range(columns)) if rng.random() < 0.5 else None
    headers = tuple(f"h{c} {cell()}" for c in range(columns))
    best = frozenset({(0, 0)} if rows else ())
    return Table(headers, tuple(rows), last, names=rng.randint(1, columns), best=best)


def printed(table, width, terminal):
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=terminal, color_system=None)
    show_table(console, table, "title")
    return re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())


def squeezed(text):
    return " ".join(text.split())


def check(table, width):
    """Every word is whole in some line, a short cell too; only what cannot be cut is too wide."""
    lines = [line.rstrip() for line in printed(table, width, terminal=True).splitlines()]
    rows = [*table.rows, *([table.last] if table.last else [])]
    names = [squeezed(row[0]) for row in rows]
    for line in lines:
        longest = max(map(cell_len, line.split()), default=0)
        assert cell_len(line) <= width or longest > width // 3 or squeezed(line) in names
    shown = "\n".join(map(squeezed, lines))
    for row in rows:
        for cell in row:
            assert all(word in shown for word in cell.split())
            if cell_len(cell) <= width // 3:
                assert squeezed(cell) in shown


@pytest.mark.parametrize("width", WIDTHS)
def test_the_tables_of_commands_are_whole(width):
    for table in tables().values():
        text = printed(table, width, terminal=True)
        assert all(cell_len(line.rstrip()) <= width for line in text.splitlines())
        check(table, width)


@pytest.mark.parametrize("seed", range(200))
def test_any_table_is_whole(seed):
    for width in WIDTHS:
        check(random_table(seed), width)


@pytest.mark.parametrize("seed", range(50))
def test_into_a_pipe_goes_a_line_for_each_row(seed):
    table = random_table(seed)
    lines = [squeezed(line) for line in printed(table, 80, terminal=False).splitlines()]
    for row in (table.headers, *table.rows, *([table.last] if table.last else [])):
        assert squeezed(" ".join(row)) in lines


def test_into_a_pipe_goes_what_the_commands_show():
    for table in tables().values():
        lines = [squeezed(line) for line in printed(table, 60, terminal=False).splitlines()]
        for row in table.rows:
            assert squeezed(" ".join(row)) in lines


def test_what_fits_is_a_table_and_headers_are_the_first_to_give_way():
    table = Table(("client", "base test perplexity"), (("ann", "9.53"), ("bob", "612")))
    assert "base test perplexity" in printed(table, 40, terminal=True)
    narrow = printed(table, 24, terminal=True)
    assert "perplexity" in narrow and "base test perplexity" not in narrow
    assert re.search(r"^ *ann +9\.53", narrow, re.MULTILINE)
    assert "\nbob\n  base test perplexity\n    612\n" in printed(table, 12, terminal=True)
