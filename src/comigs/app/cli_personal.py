"""This module holds the commands of personal models, which cli.py mounts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from comigs.app.cli_options import AllowCode, Cache, RunPath
from comigs.errors import UserError, require_finite, require_utf8
from comigs.text import Table, harmless

if TYPE_CHECKING:
    from comigs.runs.tasks import Tasks


def evaluate(
    run: RunPath,
    split: Annotated[
        str | None,
        typer.Option(metavar="SPLIT", help="Which text: train, valid or test. Default: test."),
    ] = None,
    client: Annotated[str | None, typer.Option(metavar="NAME", help="One client only.")] = None,
    model: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Measure this export of the run instead.")
    ] = None,
    answers: Annotated[
        bool,
        typer.Option(
            "--answers", help="Ask the questions of the clients' chats instead: docs/tasks.md."
        ),
    ] = False,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE", help="Ask this task of lm-evaluation-harness instead. Repeatable."
        ),
    ] = None,
    tasks_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Task files, for --tasks by name."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="With --tasks: ask through the chat template.")
    ] = False,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="With --answers, --tasks: the first ones of each only."),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="With --answers: tokens to write at most. Default: 128."),
    ] = None,
    show: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="With --answers: show N questions and answers."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    cache: Cache = None,
    allow_code: AllowCode = False,
) -> None:
    """Measure each client's own model, and the base, on every token of a split."""
    from comigs.app import api
    from comigs.app.console import Console
    from comigs.runs.reader import Reader

    # An option that changes nothing is not what was meant.
    needs_tasks = {"--tasks-dir": tasks_dir, "--chat": chat or None}
    needs_answers = {"--max-new-tokens": max_new_tokens, "--show": show}
    _require_with(needs_tasks, "--tasks", bool(tasks))
    _require_with(needs_answers, "--answers", answers)
    _require_with({"--limit": limit}, "--answers or --tasks", bool(answers or tasks))
    if tasks and not answers and split is not None:
        raise UserError("--split: has no effect on --tasks, whose files name it; leave it out")
    if show is not None and as_json:
        raise UserError("--show: prints text beside a table, and --json has neither; leave one out")

    which, console = api.split_named(split or "test"), Console(quiet=as_json)
    reader = Reader(allow_code, cache)
    if answers or tasks:
        from comigs.app.tasks import evaluate_answers, evaluate_tasks
        from comigs.personal.tasks.extra import OwnQuestions, TaskFiles
        from comigs.runs.tasks import LONGEST, Tasks

        if model is not None:
            raise UserError("--model: is measured on text alone; leave out --answers and --tasks")
        folder = api.open_run(run, reader)
        asked = Tasks(clients={})
        if tasks:
            files = TaskFiles(tasks, tasks_dir, chat)
            asked |= evaluate_tasks(folder, files, client, limit, console.say)
        if answers:
            how = OwnQuestions(which, limit, max_new_tokens or LONGEST, show or 0)
            asked |= evaluate_answers(folder, client, how, console.say)
        _show_tasks(asked, as_json)
        return
    # An export is measured on the same text, so that both figures can be compared.
    if model is None:
        results = api.evaluate(run, which, client, reader, console.say)
    else:
        from comigs.app.export import evaluate_export

        results = evaluate_export(run, model, which, client, reader)
    if as_json:
        typer.echo(json.dumps(results, indent=1))
    else:
        console.table(evaluation_table(results, which))


def evaluation_table(results: Mapping[str, Mapping[str, Mapping[str, Any]]], split: str) -> Table:
    """Return what `evaluate` returns as a table for people."""
    rows = []
    for name, measured in results.items():
        base, personal = measured["base"], measured["personal"]
        perplexities = (f"{base['perplexity']:.2f}", f"{personal['perplexity']:.2f}")
        bits, tokens = f"{personal['bits_per_byte']:.4f}", f"{personal['tokens']:,}"
        rows.append((name, *perplexities, bits, tokens))
    perplexities = (f"base {split} perplexity", f"personal {split} perplexity")
    return Table(("client", *perplexities, "bits per byte", "tokens"), tuple(rows))


def _require_with(options: Mapping[str, Any], needed: str, is_there: bool) -> None:
    """Raise UserError for an option that is given without the one it belongs to."""
    for name, value in options.items():
        if value is not None and not is_there:
            raise UserError(f"{name}: has no effect without {needed}; add that or leave it out")


def _show_tasks(tasks: Tasks, as_json: bool) -> None:
    from comigs.app.console import Console
    from comigs.runs.report.tasks_table import tasks_table

    if as_json:
        typer.echo(json.dumps(tasks.as_json(), indent=1))
    elif (table := tasks_table(tasks.clients)) is not None:
        Console().table(table)


def generate(
    run: RunPath,
    client: Annotated[str, typer.Option(metavar="NAME", help="Whose model.")],
    prompt: Annotated[str, typer.Option(help="Text to go on from; with --chat, a message.")],
    chat: Annotated[
        bool, typer.Option("--chat", help="Write the answer to the prompt, by the chat template.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 60,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0: always the likeliest token.")
    ] = 0.0,
    seed: Annotated[
        int | None, typer.Option(help="Makes a temperature above 0 repeatable.")
    ] = None,
    allow_code: AllowCode = False,
) -> None:
    """Write text with a client's own model."""
    # torch would refuse these too, but later and in words of its own
    require_finite("--temperature", temperature, ", 0 or more")
    if seed is not None and not 0 <= seed < 2**63:
        raise UserError(f"--seed: given {seed}; must be a whole number from 0 to 2^63 - 1")
    require_utf8("--prompt", prompt)
    from comigs.app import api
    from comigs.personal.serve.sampling import COLDEST
    from comigs.runs.reader import Reader

    # what is wrong with the prompt is said before anything is written: with the first piece
    sampling: dict[str, Any] = {}
    if temperature >= COLDEST:
        sampling = {"do_sample": True, "temperature": temperature}
    model = api.open_personal_model(run, client, Reader(allow_code))
    asked = [{"role": "user", "content": prompt}] if chat else prompt
    pieces = model.stream(asked, max_new_tokens=max_new_tokens, seed=seed, **sampling)
    # whatever ends the reading, as `| head` does, ends the writing first
    with closing(pieces):
        first = next(pieces, "")
        typer.echo(harmless(first if chat else prompt + first), nl=False)
        for piece in pieces:
            typer.echo(harmless(piece), nl=False)
        typer.echo()


def export(
    run: RunPath,
    client: Annotated[str, typer.Option(metavar="NAME", help="Whose model.")],
    to: Annotated[
        str,
        typer.Option(
            metavar="FORMAT", help="transformers, gguf, gguf-base, gguf-adapter, peft or flat."
        ),
    ] = "flat",
    out: Annotated[
        Path | None,
        typer.Option(help="New folder, or FILE.gguf. Default: exports/RUN-CLIENT-FORMAT."),
    ] = None,
    type: Annotated[
        str | None,
        typer.Option(help="Of the stored numbers, as q8_0. Default: the format's first."),
    ] = None,
    cache: Cache = None,
    allow_code: AllowCode = False,
) -> None:
    """Write a client's own model for other programs, and check it. See docs/export.md."""
    from comigs.app import api
    from comigs.app.console import Console
    from comigs.app.export import export as write
    from comigs.runs.reader import Reader

    console, folder = Console(), api.open_run(run, Reader(allow_code, cache))
    done = write(folder, client, to, out, type, console.say)
    for line in done.lines():
        console.result(line)


def routes(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders, all on one base.")
    ],
    client: Annotated[str, typer.Option(metavar="NAME", help="Whose model.")],
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A text in UTF-8. Default: the client's test text."),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=1, max=5000, help="Tokens that are shown as they stand.")
    ] = 300,
    block: Annotated[
        int | None, typer.Option(min=0, help="Whose weights colour them. Default: all, the mean.")
    ] = None,
    relative: Annotated[
        bool, typer.Option("--relative", help="Colour how far a token is from the others' mean.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page with every block instead.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
    cache: Cache = None,
    allow_code: AllowCode = False,
) -> None:
    """Show which tokens go to what all know and which to a client's own experts, block by block."""
    from comigs.app import routes as routing
    from comigs.app.console import Console
    from comigs.runs.reader import Reader
    from comigs.runs.report.routes_page import require_page, write_routes
    from comigs.runs.report.routes_part import extremes_table, kinds_table

    # a page that cannot be written is refused before anything is read
    if out is not None:
        require_page(out)
    found = routing.routes(runs, [client], text, tokens, Reader(allow_code, cache))
    last = found[0].blocks - 1
    if block is not None and block > last:
        raise UserError(f"--block: given {block}; the blocks of this base are 0 to {last}")

    # one of page, JSON and terminal is what was asked for
    if out is not None:
        write_routes(found, out)
    if as_json:
        typer.echo(json.dumps([one.as_json() for one in found]))
        return
    console = Console()
    if out is not None:
        console.result(f"page: {out} (it holds text of {client})")
        return
    for one in found:
        for line in routing.passage_lines(one, block, relative):
            typer.echo(line)
        console.table(kinds_table(one), "generalist weight by block and kind of token")
        if (extremes := extremes_table(one)) is not None:
            console.table(extremes, "tokens that go most to either side, by block")
