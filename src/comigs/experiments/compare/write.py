"""This module writes a comparison as files: the page, tables and figures for a paper, in a folder
of their own.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from comigs.errors import UserError
from comigs.experiments.compare import export, plots, tables
from comigs.experiments.compare.compared import Compared
from comigs.experiments.compare.discover import common_folder
from comigs.experiments.compare.page import comparison_page
from comigs.files import ELSEWHERE, ClosedFolder, write_files, writing
from comigs.runs.report.page import HERE, is_written_by, mark

PAGE, TABLE = "compare.html", "table.md"
TABLES = (TABLE, "table.csv", "runs.csv", "table.tex")
KINDS: tuple[Literal["svg", "pdf"], ...] = ("svg", "pdf")
FILES = (PAGE, *TABLES, *(f"{plot}.{kind}" for plot in plots.PLOTS for kind in KINDS))


def write_comparison(compared: Compared, out: Path | None = None) -> list[Path]:
    """Write FILES into `out`, by default `compare` in the folder that holds the runs; return what
    was written.

    Files of an earlier comparison are replaced. Raises UserError where such a file is somebody
    else's.
    """
    folder = out
    if folder is None:  # beside runs that may be somebody else's
        home = common_folder(compared.paths)
        folder = home / "compare"
        if home.exists():  # packed runs have left their folders
            ClosedFolder(home).refuse_link("compare")
    with writing(folder, ELSEWHERE):
        # The page and the table say that a folder is ours.
        there = [name for name in FILES if (folder / name).exists()]
        if there and not any(is_written_by(folder / name, "compare") for name in (PAGE, TABLE)):
            raise UserError(
                f"{folder / there[0]}: not written by comigs compare, so it is kept; {ELSEWHERE}"
            )
        # So the page is written first, before anything else could be left alone there.
        contents = _contents(compared)
        write_files(folder, contents)
        for name in set(there) - contents.keys():
            (folder / name).unlink()
    return [folder / name for name in contents]


def _contents(compared: Compared) -> dict[str, bytes]:
    """Return file name -> what it holds."""
    c, drawn = compared.comparison, plots.all_plots(compared.comparison)
    table = export.markdown(compared.title, compared.tables(), (*compared.notes, *compared.remarks))
    written = {
        PAGE: comparison_page(compared, drawn),
        TABLE: f"<!-- {mark('compare')} -->\n{table}",
        "table.csv": export.settings_csv(c),
        "runs.csv": export.runs_csv(c),
        "table.tex": "% needs \\usepackage{booktabs}\n" + _latex(compared),
    }
    files = {name: text.encode() for name, text in written.items()}
    # A paper is white, so its figures have the page's light colours.
    root = (HERE / "report.css").read_text(encoding="utf-8").partition("}")[0]
    colours = dict(re.findall(r"(--[\w-]+): (#[0-9a-f]{6});", root))
    for plot in drawn:
        for kind in KINDS:
            files[f"{plot.name}.{kind}"] = plots.figure_file(plot, c.settings, colours, kind)
    return files


def _latex(compared: Compared) -> str:
    """Return the main tables, each with a caption that says what its numbers are."""
    c, metric = compared.comparison, tables.WORDS[compared.comparison.metric]
    said = f"test {metric}, mean over clients; mean and standard deviation over seeds"
    main = []
    if len(c.datasets) > 1:
        main.append(("All datasets", tables.combined_table(c), said))
    if c.baseline:
        said += f", differences and paired t-test against {c.baseline.words}"
    main += [(results.name, tables.main_table(c, results), said) for results in c.datasets]
    made = []
    for name, table, how in main:
        made.append(export.latex_table(table, f"{name}: {how}.", f"{compared.title} {name}"))
    return "".join(made)
