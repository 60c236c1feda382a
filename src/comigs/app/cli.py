"""The command line: one command per verb a person does. Heavy imports wait until a command needs
them.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from comigs.app import cli_federation
from comigs.app.exit import exit_code, finish
from comigs.errors import UserError
from comigs.text import plural

if TYPE_CHECKING:
    from comigs.app.console import Console
    from comigs.config import Config

app = typer.Typer(
    name="comigs", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    suggest_commands=False,  # click does
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Many devices, each with private text, fine-tune one language model together; each ends with its own.",
    epilog="Start with: comigs run configs/quickstart.toml",
)  # fmt: skip

app.add_typer(cli_federation.app)

ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A TOML file; configs/quickstart.toml is one.")
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a field, as client.steps=20. Repeatable."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the result only.")]


def _config(
    path: Path, overrides: list[str] | None, method: str | None = None, seed: int | None = None
) -> Config:
    from comigs.config import load_config

    given = list(overrides or [])
    given += [f'method="{method}"'] if method is not None else []
    given += [f"seed={seed}"] if seed is not None else []
    return load_config(path, given)


def _show_version(wanted: bool) -> None:
    if wanted:
        from comigs import __version__

        typer.echo(f"comigs {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", is_eager=True, callback=_show_version
        ),
    ] = False,
) -> None:
    pass


@app.command()
def run(
    config: ConfigFile,
    out: Annotated[
        Path | None, typer.Option(help="New run folder. Default: the next free runs/NAME.")
    ] = None,
    overrides: Set = None,
    method: Annotated[
        str | None, typer.Option(help="See `comigs list`. Short for --set method=...")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Short for --set seed=...")] = None,
    engine: Annotated[
        str, typer.Option(help="in-process, or flower: clients on devices of their own.")
    ] = "in-process",
    federation: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="With --engine flower: the federation's folder."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Show what it would take: parameters, bytes, memory, time. Trains nothing.",
        ),
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Train all clients of CONFIG together, measure each one's own model, write a report."""
    from comigs.app.console import Console
    from comigs.files import require_free

    if out is not None:
        require_free(out)
    cli_federation.require_engine(engine, federation)
    settings = _config(config, overrides, method, seed)
    console = Console(settings, quiet)
    if dry_run:
        if federation is not None:
            raise UserError(
                "--dry-run: the text is on the federation's devices, so what a run takes cannot be told from here; "
                "leave out --engine, with a config that has text, to see it for this machine"
            )
        _show_plan(settings, console)
        return
    with console:
        if federation is not None:
            path = cli_federation.run_in(federation, settings, out, console)
        else:
            from comigs.app import api

            path = api.run(settings, out, console.report, console.say).path
    finish(path, console, federation is not None)


def _show_plan(settings: Config, console: Console) -> None:
    """What a run would take."""
    from comigs.app import dry_run

    with console:
        table, lines = dry_run.dry_run(settings, console.report, console.say)
    console.table(table)
    for line in lines:
        console.result(line)


@app.command()
def resume(
    run: RunPath,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes. Default: as the run began with.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Go on with a stopped run from its last whole round; the result is the same to the bit."""
    from comigs.app.console import Console
    from comigs.runs.folder import RunFolder

    folder = RunFolder.open(run)
    console = Console(folder.config(), quiet)
    environment = folder.environment()
    federated = "federation" in environment
    if "on_device_of" in environment:
        raise UserError(
            f"{run}: a device's own part of a run; it goes on when its server asks (comigs federation client BUNDLE)"
        )
    with console:
        if federated:
            if workers is not None:
                raise UserError(
                    "--workers: devices of a federation work by themselves; leave it out"
                )
            cli_federation.resume_in(folder, console)
        else:
            from comigs.app import api

            api.resume(run, console.report, console.say, workers)
    finish(run, console, federated)


@app.command()
def evaluate(
    run: RunPath,
    split: Annotated[
        str, typer.Option(metavar="SPLIT", help="Which text: train, valid or test.")
    ] = "test",
    client: Annotated[str | None, typer.Option(metavar="NAME", help="One client only.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure each client's own model, and the base, on every token of a split."""
    from comigs.app import api

    which = api.split_named(split)
    results = api.evaluate(run, which, client)
    if as_json:
        typer.echo(json.dumps(results, indent=1))
        return
    from comigs.app.console import Console

    Console().table(api.evaluation_table(results, which))


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders, finished or not.")
    ],
    out: Annotated[Path | None, typer.Option(help="With one run: where its page goes.")] = None,
) -> None:
    """Write report.html into each run: gains, curves, routing, costs. One file that opens
    offline.
    """
    from comigs.runs.report.page import write_reports

    for page in write_reports(runs, out):
        typer.echo(page)


@app.command()
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
    """Run methods x datasets x seeds x settings of FILE. What is done is skipped, what was stopped
    goes on.
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
    given = [*(["--out", str(out)] if out else []), *(["--jobs", str(jobs)] if jobs > 1 else [])]
    given += [word for text in only or [] for word in ("--only", text)]
    failed = run_sweep(plan, jobs, console.say, shlex.join(["comigs", "sweep", str(file), *given]))
    if failed:
        console.result(f"{len(failed)} of {len(plan.runs)} runs failed:")
        for label, problem in failed.items():
            console.result(f"  {label}: {problem}")
        raise typer.Exit(1)
    console.say(f"next: {command('compare', plan.folder)}")


@app.command()
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
            help="Instead: keep the runs as three files, which compare and sweep read as well.",
        ),
    ] = False,
) -> None:
    """Compare finished runs over seeds: tables, paired tests, plots, one page. Other data is kept
    apart.
    """
    from comigs.app.console import Console

    console = Console()
    if pack:
        from comigs.experiments.compare.pack import pack_runs

        folder, number = pack_runs(runs, out)
        console.result(f"packed: {folder}, {plural(number, 'run')}; run folders stay as they are")
        return
    try:
        from comigs.experiments.compare.compared import compare_runs
        from comigs.experiments.compare.write import write_comparison
    except ModuleNotFoundError as error:
        if error.name != "pandas":
            raise
        raise UserError("comigs compare needs pandas: pip install 'comigs[compare]'") from None

    compared = compare_runs(runs, metric, baseline)
    written = write_comparison(compared, out)
    for title, table in compared.tables(brief=True):
        console.table(table, title)
    for note in compared.notes:
        console.say(f"note: {note}")
    console.say(f"{written[0].parent}: {', '.join(path.name for path in written[1:])}")
    console.result(f"page: {written[0]}")


@app.command()
def generate(
    run: RunPath,
    client: Annotated[str, typer.Option(metavar="NAME", help="Whose model.")],
    prompt: Annotated[str, typer.Option(help="Text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 60,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0: always the likeliest token.")
    ] = 0.0,
    seed: Annotated[
        int | None, typer.Option(help="Makes a temperature above 0 repeatable.")
    ] = None,
) -> None:
    """Write text with a client's own model."""
    if not math.isfinite(temperature):
        raise UserError(f"--temperature: given {temperature}; must be a finite number, 0 or more")
    if seed is not None and not 0 <= seed < 2**63:
        raise UserError(f"--seed: given {seed}; must be a whole number from 0 to 2^63 - 1")
    if not prompt.isprintable() and any("\ud800" <= c <= "\udfff" for c in prompt):
        raise UserError("--prompt: not valid UTF-8; write it in a UTF-8 terminal")
    from comigs.app import api

    model = api.open_personal_model(run, client)
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
    )
    pieces = model.stream(prompt, max_new_tokens=max_new_tokens, seed=seed, **sampling)
    first = next(pieces, "")  # what is wrong with the prompt is said before anything is written
    typer.echo(prompt + first, nl=False)
    for piece in pieces:
        typer.echo(piece, nl=False)
    typer.echo()


@app.command()
def prepare(config: ConfigFile, overrides: Set = None) -> None:
    """Read, split and tokenise the text of CONFIG's clients, and check it for leaks. Trains
    nothing.
    """
    settings = _config(config, overrides)
    from comigs.app import api

    api.prepare(settings, typer.echo)


@app.command(name="list")
def list_everything(
    what: Annotated[
        str | None,
        typer.Argument(metavar="[WHAT]", help="methods, bases or datasets; default: all."),
    ] = None,
) -> None:
    """The methods, bases and datasets there are. Costs of methods: default experts on mini, per
    client and round.
    """
    from comigs.app import api
    from comigs.app.console import Console

    tables = api.inventory()
    if what is not None and what not in tables:
        raise UserError(f'list: given "{what}"; there are: {", ".join(tables)}')
    for title, table in tables.items():
        if what in (None, title):
            Console().table(table, title)


def main() -> None:
    """Entry point."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ.setdefault(
        "TRANSFORMERS_VERBOSITY", "error"
    )  # its warnings are for people who call it themselves
    sys.exit(exit_code(lambda: app(standalone_mode=False, prog_name="comigs")))
