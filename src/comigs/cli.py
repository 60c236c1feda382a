"""The command line: one command per verb a person does. Heavy imports wait until a command needs them."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import click
import typer

from comigs.config import Config, Split, load_config
from comigs.console import Console
from comigs.errors import UserError

app = typer.Typer(
    name="comigs", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Many devices, each with private text, fine-tune one language model together; each ends with its own.",
)  # fmt: skip

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A TOML file; configs/quickstart.toml is one.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a field: client.steps=20. Repeatable.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the result only.")]


def _config(path: Path, overrides: list[str] | None, method: str | None = None, seed: int | None = None) -> Config:
    given = list(overrides or [])
    given += [f'method="{method}"'] if method is not None else []
    given += [f"seed={seed}"] if seed is not None else []
    return load_config(path, given)


@app.command()
def run(
    config: ConfigFile,
    out: Annotated[Path | None, typer.Option(help="New run folder. Default: the next free runs/NAME.")] = None,
    overrides: Set = None,
    method: Annotated[str | None, typer.Option(help="See `comigs list`. Short for --set method=...")] = None,
    seed: Annotated[int | None, typer.Option(help="Short for --set seed=...")] = None,
    quiet: Quiet = False,
) -> None:
    """Train all clients of CONFIG together, evaluate each one's own model, write a report."""
    settings = _config(config, overrides, method, seed)
    from comigs import api

    with Console(settings, quiet) as console:
        _finish(api.run(settings, out, console.report, console.say).path, console)


@app.command()
def resume(run: RunPath, quiet: Quiet = False) -> None:
    """Go on with a stopped run from its last whole round; the result is the same to the bit."""
    from comigs import api

    with Console(api.open_run(run).config(), quiet) as console:
        _finish(api.resume(run, console.report, console.say).path, console)


def _finish(path: Path, console: Console) -> None:
    """The table of clients and the page."""
    from comigs.report.read import read_run
    from comigs.report.report import write_report
    from comigs.report.tables import client_table

    page = write_report(path)
    console.table(client_table(read_run(path), brief=True))
    console.result(f"report: {page}")


@app.command()
def evaluate(
    run: RunPath,
    split: Annotated[Split, typer.Option(help="Which text.")] = "test",
    client: Annotated[str | None, typer.Option(help="One client only.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure each client's own model, and the base, on every token of a split."""
    from comigs import api

    results = api.evaluate(run, split, client)
    if as_json:
        typer.echo(json.dumps(results, indent=1))
        return
    Console().table(api.evaluation_table(results, split))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, finished or not.")],
    out: Annotated[Path | None, typer.Option(help="With several runs: one page that compares them.")] = None,
) -> None:
    """Write report.html into each run: gains, curves, routing, costs. One file that opens offline."""
    from comigs.report.report import write_reports

    for page in write_reports(runs, out):
        typer.echo(page)


@app.command()
def generate(
    run: RunPath,
    client: Annotated[str, typer.Option(help="Whose model.")],
    prompt: Annotated[str, typer.Option(help="Text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 60,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes a temperature above 0 repeatable.")] = None,
) -> None:
    """Write text with a client's own model."""
    from comigs import api

    model = api.open_personal_model(run, client)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
    typer.echo(prompt, nl=False)
    for piece in model.stream(prompt, max_new_tokens=max_new_tokens, seed=seed, **sampling):
        typer.echo(piece, nl=False)
    typer.echo()


@app.command()
def prepare(config: ConfigFile, overrides: Set = None) -> None:
    """Read, split and tokenise the text of CONFIG's clients, and check it for leaks. Trains nothing."""
    settings = _config(config, overrides)
    from comigs import api

    api.prepare(settings, typer.echo)


@app.command(name="list")
def list_everything() -> None:
    """The methods, bases and datasets there are."""
    from comigs import api

    for title, table in api.inventory().items():
        Console().table(table, title)


def main() -> None:
    """Entry point. What a user did wrong is one line and exit code 2; Ctrl-C is exit code 130."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        _fail(str(error), error.exit_code)
    except click.ClickException as error:
        _fail(f"{error.format_message()} (try: comigs --help)", 2)
    except (KeyboardInterrupt, click.Abort):
        _fail("stopped before anything was written", 130)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
