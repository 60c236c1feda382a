"""A comparison as files: the page, tables and figures for a paper, in a folder of their own."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Literal

from comigs.errors import UserError
from comigs.experiments.compare import export, plots, tables
from comigs.experiments.compare.compared import Compared
from comigs.experiments.compare.discover import common_folder
from comigs.experiments.compare.page import PLOTS, all_plots, comparison_page
from comigs.files import write_whole, writing
from comigs.runs.report.page import HERE, is_written_by, mark

PAGE, TABLE = "compare.html", "table.md"
TABLES = (TABLE, "table.csv", "runs.csv", "table.tex")
KINDS: tuple[Literal["svg", "pdf"], ...] = ("svg", "pdf")
FILES = (PAGE, *TABLES, *(f"{plot}.{kind}" for plot in PLOTS for kind in KINDS))
ADVICE = "choose another folder with --out"


def write_comparison(compared: Compared, out: Path | None = None) -> list[Path]:
    """Write FILES into `out`, by default `compare` in the folder that holds the runs; returns what
    was written.

    Files of an earlier comparison are replaced. Raises UserError where such a file is somebody
    else's.
    """
    folder = out if out is not None else common_folder(compared.paths) / "compare"
    with writing(folder, ADVICE):
        there = [name for name in FILES if (folder / name).exists()]
        if there and not any(is_written_by(folder / name, "compare") for name in (PAGE, TABLE)):
            raise UserError(
                f"{folder / there[0]}: not written by comigs compare, so it is kept; {ADVICE}"
            )
        contents = _contents(compared)
        folder.mkdir(parents=True, exist_ok=True)
        for (
            name,
            content,
        ) in contents.items():  # the page first: it marks the folder as ours, as the table does
            write_whole(folder / name, partial(_fill, content))
        for name in set(there) - contents.keys():
            (folder / name).unlink()
    return [folder / name for name in contents]


def _contents(compared: Compared) -> dict[str, bytes]:
    """File name -> what it holds."""
    c, parts = compared.comparison, compared.tables()
    said = (
        f"test {tables.WORDS[c.metric]}, mean over clients; mean and standard deviation over seeds"
    )
    tested = f", differences and paired t-test against {c.baseline.words}" if c.baseline else ""
    main = [("All datasets", tables.combined_table(c), said)] if len(c.datasets) > 1 else []
    main += [(results.name, tables.main_table(c, results), said + tested) for results in c.datasets]
    latex = "".join(
        export.latex_table(table, f"{n}: {how}.", f"{compared.title} {n}") for n, table, how in main
    )
    table = export.markdown(compared.title, parts, (*compared.notes, *compared.remarks))
    written = {
        PAGE: comparison_page(compared),
        TABLE: f"<!-- {mark('compare')} -->\n{table}",
        "table.csv": export.settings_csv(c),
        "runs.csv": export.runs_csv(c),
        "table.tex": "% needs \\usepackage{booktabs}\n" + latex,
    }
    files = {name: text.encode() for name, text in written.items()}
    colours = _paper_colours()
    for plot in all_plots(c):
        files |= {
            f"{plot.name}.{kind}": plots.figure_file(plot, c.settings, colours, kind)
            for kind in KINDS
        }
    return files


def _fill(content: bytes, file: Path) -> None:
    file.write_bytes(content)


def _paper_colours() -> dict[str, str]:
    """The page's light colours, by their CSS variables."""
    root = (HERE / "report.css").read_text(encoding="utf-8").partition("}")[0]
    return dict(re.findall(r"(--[\w-]+): (#[0-9a-f]{6});", root))
