"""`comigs chat` and `comigs serve`: what a person does with personal models. cli.py mounts them."""

from __future__ import annotations

import signal
import sys
from contextlib import closing
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import typer

from comigs.app.cli_options import AllowCode, RunPath
from comigs.errors import UserError, require_extra, require_finite, require_utf8

LONGEST = 86400  # seconds that a request may be allowed: a day


def chat(
    run: RunPath,
    client: Annotated[str, typer.Option(metavar="NAME", help="Whose model.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, max=10.0, help="0: always the likeliest token.")
    ] = 0.0,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Makes a temperature above 0 repeatable.")
    ] = None,
    system: Annotated[
        str, typer.Option(metavar="TEXT", help="What stands before the conversation.")
    ] = "",
    allow_code: AllowCode = False,
) -> None:
    """Talk with a client's own model in the terminal."""
    require_finite("--temperature", temperature, ", 0 or more")
    require_utf8("--system", system)
    from comigs.app import api
    from comigs.personal.chat import Chat, Style
    from comigs.personal.talk import talk
    from comigs.runs.reader import Reader

    # What is wrong with the run or the client is said before the base is loaded.
    folder = api.open_run(run, Reader(allow_code))
    folder.config().client_named(client)
    folder.require_a_round()
    base = api.base_of(folder)
    style = Style(max_new_tokens, temperature, seed)
    with closing(Chat(folder, base, client, style, typer.echo)) as conversation:
        conversation.set_system(system)
        # bytes that are no UTF-8 are said of their line
        if isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")
        # Ctrl-C stops an answer; what else is to end a program ends this one
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        talk(conversation, prompts=sys.stdin.isatty())


def serve(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders, all on one base.")
    ],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    host: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS", help="To listen on. Others than this machine's own need --keys."
        ),
    ] = "127.0.0.1",
    keys: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help='TOML with a key for each model: "RUN/CLIENT" = "...".'),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="float32: a text does not depend on who else is served; bfloat16: it may."
        ),
    ] = "float32",
    rows: Annotated[int, typer.Option(min=1, max=256, help="Texts that are written at once.")] = 16,
    queue: Annotated[
        int, typer.Option(min=1, help="Requests that wait at most; others get 429.")
    ] = 256,
    context: Annotated[
        int, typer.Option(min=2, help="Tokens of a prompt and its answer together.")
    ] = 2048,
    seconds: Annotated[
        float, typer.Option(help="For a request, from its arrival to its end.")
    ] = 300.0,
    allow_code: AllowCode = False,
) -> None:
    """Serve all clients' models on one base, with OpenAI's API."""
    # What is wrong is said before anything heavy is imported.
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f'--dtype: given "{dtype}"; must be float32 or bfloat16')
    if not 1 <= seconds <= LONGEST:
        raise UserError(f"--seconds: given {seconds}; must be a number from 1 to {LONGEST}")
    require_extra("serve", ("starlette", "uvicorn"), "comigs serve")
    from comigs.app import api, serving
    from comigs.app.console import Console
    from comigs.personal.serve.answers import Bounds
    from comigs.personal.serve.scheduler import Limits
    from comigs.runs.reader import Reader

    folders = [api.open_run(run, Reader(allow_code)) for run in runs]
    bounds = Bounds(context, seconds=seconds)
    address = serving.Address(host, port, keys)
    serving.serve(folders, address, dtype, Limits(rows, queue), bounds, Console().say)
