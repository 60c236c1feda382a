"""This module holds `comigs federation ...`: what an operator and a device's owner do.

cli.py mounts it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from comigs.errors import UserError, require_finite
from comigs.federation import require_flower
from comigs.files import command
from comigs.text import one_line

if TYPE_CHECKING:
    from comigs.app.console import Console
    from comigs.config import Config
    from comigs.runs.folder import RunFolder

app = typer.Typer(
    name="federation",
    no_args_is_help=True,
    help="Train together over a network: one operator with a server, and owners of devices. "
    "See docs/deploy.md.",
)

Folder = Annotated[
    Path, typer.Argument(metavar="DIR", help="The federation's folder on the server.")
]
Name = Annotated[str, typer.Argument(metavar="NAME", help="The client's name, as configs have it.")]


@app.callback()
def _needs_flower() -> None:
    require_flower()


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
    host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Name or address of this server. Repeatable. Default: this machine alone.",
        ),
    ] = None,
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="The one port that devices must reach.")
    ] = 8443,
    base: Annotated[
        str, typer.Option(metavar="NAME", help="The base of its runs; devices load no other.")
    ] = "mini",
    dtype: Annotated[
        str, typer.Option(help="The type of its weights: auto, float32, bfloat16 or float64.")
    ] = "auto",
    weights: Annotated[
        str, typer.Option(help="How devices hold them in memory: whole, int8 or int4.")
    ] = "whole",
) -> None:
    """Found a federation: its own certificate authority, a server certificate, settings, a base."""
    from comigs.config import folder_or_name, parse_config
    from comigs.federation.operator.admin import found
    from comigs.federation.security import pki

    # what is made is said first, then for how long it is good, then what comes next
    section = {"name": folder_or_name(base, Path()), "dtype": dtype, "weights": weights}
    tree = {"base": section, "clients": [{"name": "any"}]}
    federation = found(folder, tuple(host or ()), port, parse_config(tree, "init").base)
    _say(
        f"federation {federation.settings.id} in {folder}, "
        f"to be reached at {federation.settings.address}"
    )
    if (pinned := federation.settings.base) is not None:
        _say(
            f"base {pinned.name}, {pinned.dtype}, weights {pinned.weights}, "
            f"sha256 {pinned.fingerprint[:12]}...: bundles pin it, and devices load no other"
        )
    _say(
        f"certificates: authority {pki.AUTHORITY_DAYS} days; server {pki.SERVER_DAYS} days, "
        f"renewed by a start of the server in the last {pki.RENEW_DAYS}"
    )
    _say(
        f"next: {command('federation invite', folder)} NAME, "
        f"then {command('federation server', folder)}"
    )


@app.command()
def invite(
    folder: Folder,
    name: Name,
    out: Annotated[Path | None, typer.Option(help="The bundle. Default: NAME.bundle.toml.")] = None,
) -> None:
    """Make the bundle that lets one device take part as NAME.

    It holds a private key, of which no copy is kept.
    """
    from comigs.federation.operator import admin

    file = admin.invite(folder, name, out)
    _say(f'{file}: give it to the owner of "{name}", by a way that others cannot read')
    _say(f"next, on the device: {command('federation client', file)} --text PATH")


@app.command()
def revoke(folder: Folder, name: Name) -> None:
    """Refuse a client from now on. Its bundle is worth nothing then; its name is free."""
    from comigs.federation.operator import admin

    admin.revoke(folder, name)
    _say(f'"{name}" is revoked')


@app.command()
def status(folder: Folder) -> None:
    """Show who is invited, registered, online, last seen, and in how many runs."""
    from comigs.app.console import Console
    from comigs.federation.operator import admin
    from comigs.federation.operator.folder import Federation

    table, federation = admin.status(folder), Federation.open(folder)
    state = "running"
    if not federation.running:
        state = f"not running; start it with: {command('federation server', folder)}"
    _say(f"federation {federation.settings.id} at {federation.settings.address}, server {state}")
    Console().table(table)


@app.command()
def server(folder: Folder) -> None:
    """Run the federation's server until Ctrl-C."""
    from comigs.federation.operator.server import serve

    serve(folder, _say)


@app.command()
def client(
    bundle: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="The file that the operator gave you.")
    ],
    text: Annotated[
        list[str],
        typer.Option(
            metavar="PATH",
            help="Your text, to be split; or three: train=PATH, valid=PATH, test=PATH.",
        ),
    ],
    home: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Your own part stays here. Default: in ~/.comigs."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER", help="Your copy of the base. Default: the bundle's, by its name."
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1, ...; auto: cuda where there is one.")
    ] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads. Default: as torch finds them.")
    ] = None,
    max_memory: Annotated[
        float | None,
        typer.Option(
            metavar="GB",
            min=0.01,
            help="Memory that the server may ask for. Default: four fifths of what is free.",
        ),
    ] = None,
    max_minutes: Annotated[
        float, typer.Option(min=0.01, help="Time that the server may ask for in a round.")
    ] = 120,
    specialists: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Specialists of this device from now on: it gains or loses some with its next "
            "round. Default: as the run's config says.",
        ),
    ] = None,
    only_sums: Annotated[
        bool,
        typer.Option(
            "--only-sums",
            help="Send nothing but uploads that the server can see the sum of alone.",
        ),
    ] = False,
    max_epsilon: Annotated[
        float | None,
        typer.Option(
            metavar="EPSILON",
            min=0.0,
            help="Privacy that all runs together may spend of your text, by document; runs that "
            "are not private are refused. Default: no limit.",
        ),
    ] = None,
) -> None:
    """Take part with this device until Ctrl-C."""
    from comigs.federation.device.join import Owner, join

    # What is no number is above no limit and below none.
    limits = {"memory": max_memory, "minutes": max_minutes, "epsilon": max_epsilon}
    for name, limit in limits.items():
        if limit is not None:
            require_finite(f"--max-{name}", limit)
    memory = max_memory and max_memory * 1e9
    allowed = (memory, max_minutes, specialists, only_sums, max_epsilon)
    owner = Owner(tuple(text), home, base, device, threads, *allowed)
    join(bundle, owner, _say)


def _say(line: str) -> None:
    """Print a line, whatever a name, a path or another program put into it."""
    typer.echo(one_line(line))


def require_engine(engine: str, federation: Path | None) -> None:
    """Raise UserError where the options of `comigs run` do not go together."""
    if engine not in ("in-process", "flower"):
        raise UserError(f'--engine: given "{engine}"; must be in-process or flower')
    if engine == "flower" and federation is None:
        raise UserError("--engine flower: say in which federation, with --federation DIR")
    if engine != "flower" and federation is not None:
        raise UserError("--federation: goes with --engine flower")


def run_in(federation: Path, settings: Config, out: Path | None, console: Console) -> Path:
    """Carry out `comigs run --engine flower`, and return the run folder."""
    require_flower()
    from comigs.app.setup import load, say_unread
    from comigs.federation.operator import run
    from comigs.runs.new import claimed

    with claimed(out):
        checked = run.check(settings, federation)
        say_unread(settings, "flower", console.say)
        base, resolved = load(settings, console.say)
        return run.run(resolved, base, out, checked, console.report, console.say).path


def resume_in(folder: RunFolder, console: Console) -> None:
    """Carry out `comigs resume` for a run of a federation."""
    from comigs.federation.operator import run

    run.resume(folder, console.report, console.say)
