"""This module is the command line, with one command for each verb that a person does.

Heavy imports wait until a command needs them, so that `comigs --help` is quick.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from comigs.app import cli_experiments, cli_federation, cli_personal, cli_serving
from comigs.app.cli_options import AllowCode, Cache, ConfigFile, Quiet, RunPath, Set
from comigs.app.exit import exit_code, finish
from comigs.errors import UserError

if TYPE_CHECKING:
    from comigs.config import Config

app = typer.Typer(
    name="comigs",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    suggest_commands=False,  # click does
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Many devices, each with private text, fine-tune one language model together; "
    "each ends with its own.",
    epilog="Start with: comigs run configs/quickstart.toml",
)


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

    # what does not go together is refused before anything is read or loaded
    if out is not None:
        require_free(out)
    cli_federation.require_engine(engine, federation)
    given = list(overrides or [])
    if method is not None:
        given.append(f'method="{method}"')
    if seed is not None:
        given.append(f"seed={seed}")
    settings = _config(config, given)
    if dry_run and federation is not None:
        raise UserError(
            "--dry-run: the text is on the federation's devices, so what a run takes cannot be "
            "told from here; leave out --engine, with a config that has text, to see it for this "
            "machine"
        )

    console = Console(settings, quiet)
    if dry_run:
        from comigs.app import dry_run as estimate

        with console:
            tables, lines = estimate.dry_run(settings, console.report, console.say)
        for table in tables:
            console.table(table)
        for line in lines:
            console.result(line)
        return

    with console:
        if federation is not None:
            path = cli_federation.run_in(federation, settings, out, console)
        else:
            from comigs.app import api

            path = api.run(settings, out, console.report, console.say).path
    finish(path, console, federation is not None)


@app.command()
def resume(
    run: RunPath,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes. Default: as the run began with.")
    ] = None,
    cache: Cache = None,
    allow_code: AllowCode = False,
    quiet: Quiet = False,
) -> None:
    """Go on with a stopped run from its last whole round: to the same bits, on a CPU."""
    from comigs.app.console import Console
    from comigs.runs.folder import RunFolder
    from comigs.runs.reader import Reader

    # a run says itself where its clients are
    reader = Reader(allow_code, cache)
    folder = RunFolder.open(run, reader)
    console = Console(folder.config(), quiet)
    environment = folder.environment()
    federated = "federation" in environment
    if "on_device_of" in environment:
        raise UserError(
            f"{run}: a device's own part of a run; "
            "it goes on when its server asks (comigs federation client BUNDLE)"
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

            api.resume(run, console.report, console.say, workers, reader)
    finish(run, console, federated)


app.command()(cli_personal.evaluate)
app.command()(cli_experiments.report)
app.command()(cli_experiments.sweep)
app.command()(cli_experiments.compare)
app.command()(cli_experiments.audit)
app.command()(cli_personal.generate)
app.command()(cli_personal.routes)
app.command()(cli_serving.chat)
app.command()(cli_serving.serve)
app.command()(cli_personal.export)


@app.command()
def prepare(
    config: ConfigFile,
    overrides: Set = None,
    show: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="Show N examples of each client, with what is learnt marked."
        ),
    ] = 0,
) -> None:
    """Read, split and tokenise the text of CONFIG's clients, and check it for leaks.

    Trains nothing.
    """
    settings = _config(config, overrides)
    from comigs.app import api
    from comigs.app.console import Console
    from comigs.app.show import examples

    data = api.prepare(settings, Console().say)
    for text in examples(data, settings.data.sequence_length, show, sys.stdout.isatty()):
        typer.echo(text)


@app.command(name="list")
def list_everything(
    what: Annotated[
        str | None,
        typer.Argument(metavar="[WHAT]", help="methods, bases or datasets; default: all."),
    ] = None,
) -> None:
    """Show the methods, bases and datasets there are.

    Costs of methods: default experts on mini, per client and round.
    """
    from comigs.app.console import Console
    from comigs.app.inventory import inventory

    tables = inventory()
    if what is not None and what not in tables:
        raise UserError(f'list: given "{what}"; there are: {", ".join(tables)}')
    for title, table in tables.items():
        if what in (None, title):
            Console().table(table, title)


app.add_typer(cli_federation.app)


def main() -> None:
    """Be the command `comigs`: do what its words say, and exit."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # an output that is not UTF-8 gets a question mark for what it cannot show
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    # warnings of transformers are for people who call it themselves
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.exit(exit_code(lambda: app(standalone_mode=False, prog_name="comigs")))


def _config(path: Path, overrides: list[str] | None) -> Config:
    from comigs.config import load_config

    return load_config(path, overrides or [])
