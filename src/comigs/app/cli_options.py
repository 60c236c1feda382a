"""The options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A TOML file; configs/quickstart.toml is one.")
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a field, as client.steps=20. Repeatable."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the result only.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
AllowCode = Annotated[
    bool,
    typer.Option(
        "--allow-code", help="Import the run's method where it is a module of whoever made the run."
    ),
]
Cache = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Where your tokens go. Default: where the run had yours, else .cache/comigs.",
    ),
]
