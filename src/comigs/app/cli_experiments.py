"""This module holds the commands of experiments: report, sweep and compare. cli.py mounts them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from comigs.app.cli_options import AllowCode, Cache, Quiet, Set
from comigs.errors import UserError, require_extra
from comigs.text import plural

if TYPE_CHECKING:
    from comigs.runs.routes import Routes


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders, finished or not.")
    ],
    out: Annotated[Path | None, typer.Option(help="With one run: where its page goes.")] = None,
    routes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="With one run: show where tokens of this client's test text go. The page holds "
            "some of that text then. Repeatable.",
        ),
    ] = None,
    cache: Cache = None,
    allow_code: AllowCode = False,
) -> None:
    """Write report.html into each run: gains, curves, routing, costs.

    One file that opens offline.
    """
    from comigs.app.console import Console
    from comigs.runs.report.page import write_reports

    # text is private, so a page has some only where it was asked for
    shown: Sequence[Routes] = []
    if routes:
        if len(runs) > 1:
            raise UserError(f"--routes: is for one run; {len(runs)} are given")
        from comigs.app.routes import routes as routes_of
        from comigs.runs.reader import Reader

        reader = Reader(allow_code, cache)
        shown = routes_of(runs, list(dict.fromkeys(routes)), reader=reader)
    for page in write_reports(runs, out, shown):
        Console().result(str(page))


def sweep(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A sweep file, see docs/sweep.md.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the runs. Default: runs/NAME.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at once; they share the CPUs.")] = 1,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Only runs with TEXT in their path. Repeatable."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the runs and the time they take.")
    ] = False,
) -> None:
    """Run methods x datasets x seeds x settings of FILE.

    What is done is skipped, what was stopped goes on.
    """
    from comigs.app.console import Console
    from comigs.experiments.sweep.plan import read_plan
    from comigs.experiments.sweep.run import run_sweep, show
    from comigs.files import command

    console = Console()
    plan = read_plan(file, out, only)
    if dry_run:
        show(plan, jobs, console.say)
        return

    # a stopped sweep says the command that goes on with it, in the words it was given
    again = ["comigs", "sweep", str(file)]
    if out is not None:
        again += ["--out", str(out)]
    if jobs > 1:
        again += ["--jobs", str(jobs)]
    for text in only or []:
        again += ["--only", text]
    failed = run_sweep(plan, jobs, console.say, shlex.join(again))

    if failed:
        console.result(f"{len(failed)} of {len(plan.runs)} runs failed:")
        for label, problem in failed.items():
            console.result(f"  {label}: {problem}")
        raise typer.Exit(1)
    console.say(f"next: {command('compare', plan.folder)}")


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUNS...", help="Run folders, or folders that hold some at any depth."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Default: `compare` in the folder that holds the runs."
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="A setting or method. Default: the sweep's own, else local."
        ),
    ] = None,
    metric: Annotated[
        str, typer.Option(metavar="METRIC", help="perplexity, nats_per_token or bits_per_byte.")
    ] = "perplexity",
    pack: Annotated[
        bool,
        typer.Option(
            "--pack",
            help="Instead: keep the runs as a few files, which compare and sweep read as well.",
        ),
    ] = False,
) -> None:
    """Compare finished runs over seeds: tables, paired tests, plots, one page.

    Other data is kept apart.
    """
    from comigs.app.console import Console

    # packing needs no pandas, which the extra `compare` brings
    console = Console()
    if pack:
        from comigs.experiments.compare.pack import pack_runs

        folder, number = pack_runs(runs, out)
        console.result(f"packed: {folder}, {plural(number, 'run')}; run folders stay as they are")
        return
    require_extra("compare", ("pandas",), "comigs compare")
    from comigs.experiments.compare.compared import compare_runs
    from comigs.experiments.compare.write import write_comparison

    # files are written first: what is shown is what can be read again
    compared = compare_runs(runs, metric, baseline)
    written = write_comparison(compared, out)
    for title, table in compared.tables(brief=True):
        console.table(table, title)
    for note in compared.notes:
        console.say(f"note: {note}")
    console.say(f"{written[0].parent}: {', '.join(path.name for path in written[1:])}")
    console.result(f"page: {written[0]}")


def audit(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A TOML file, as for `run`.")],
    canaries: Annotated[
        int,
        typer.Option(help="Made-up documents of each client, for each of 1, 4 and 16 copies."),
    ] = 64,
    out: Annotated[
        Path | None, typer.Option(help="New run folder. Default: the next free runs/NAME-audit.")
    ] = None,
    overrides: Set = None,
    quiet: Quiet = False,
) -> None:
    """Run a config with made-up documents in it, and guess from its models which were in.

    Writes audit.html and audit.json into the run folder.
    """
    from comigs.app.console import Console
    from comigs.config import load_config
    from comigs.experiments.audit.page import AUDIT, table

    settings = load_config(config, list(overrides or []))
    console = Console(settings, quiet)
    from comigs.app.audit import audit as audited

    with console:
        folder, found = audited(settings, canaries, out, console.report, console.say)
    console.table(table(found))
    console.result(str(folder.path / f"{AUDIT}.html"))
