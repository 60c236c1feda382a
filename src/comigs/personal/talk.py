"""`comigs chat`: a conversation in the terminal. A line is a message, or a command that begins with
a slash.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import click

from comigs.config.paths import resolve
from comigs.errors import UserError, require_utf8
from comigs.personal.chat import Chat
from comigs.personal.routes.coloured import WHOLE, coloured
from comigs.runs.routes import nothing_to
from comigs.text import harmless

HELP = """\
/reset         forget what was said
/system TEXT   begin anew after this text (none: without one)
/client NAME   go on with another client's model
/routes        the last answer, coloured by how much of it comes from what clients share
/save FILE     write the conversation as JSON
/help          this
/quit          end (as Ctrl-D does); Ctrl-C stops an answer"""


def talk(chat: Chat, prompts: bool) -> None:
    """Read lines from standard input until its end. prompts: show who speaks."""
    if prompts:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (editing and history of the line that is typed)
        click.echo(_greeting(chat))
    while True:
        # Ctrl-C while nothing is written ends nothing; the end of the input does.
        try:
            line = input(f"{chat.name}> " if prompts else "")
        except EOFError:
            if prompts:
                click.echo()
            return
        except KeyboardInterrupt:
            click.echo("\n(Ctrl-D ends)")
            continue
        # What goes wrong with one line is said, and the next line is read.
        if line.strip() == "/quit":
            return
        try:
            require_utf8("this line", line)
            handle(chat, line)
        except UserError as error:
            click.echo(f"error: {error}", err=True)
        except KeyboardInterrupt:  # between two pieces, or while a command runs
            click.echo("\n(stopped)")


def _greeting(chat: Chat) -> str:
    kind = (
        "its chat template"
        if chat.base.tokenizer.chat_template
        else "no chat template: it goes on from your text"
    )
    return (
        f"{chat.client} of {chat.folder.path}, on {chat.base.name} ({kind}); /help lists commands"
    )


def handle(chat: Chat, line: str) -> None:
    """Do what a line says. Raises UserError."""
    if line.startswith("/"):
        name, _, argument = line.partition(" ")
        if name not in COMMANDS:
            raise UserError(f"{name}: no such command; there are: {', '.join(COMMANDS)}, /quit")
        COMMANDS[name](chat, argument.strip())
    elif line.strip():
        _answer(chat, line)


def _answer(chat: Chat, text: str) -> None:
    """Show an answer as it is written; Ctrl-C stops it, and keeps what is there."""
    pieces = chat.ask(text)
    try:
        for piece in pieces:
            click.echo(harmless(piece), nl=False)
        click.echo()
    except KeyboardInterrupt:
        click.echo("\n(stopped)")
    finally:
        pieces.close()


def _reset(chat: Chat, argument: str) -> None:
    chat.reset()
    click.echo("(forgotten)")


def _system(chat: Chat, argument: str) -> None:
    chat.set_system(argument)
    click.echo("(a new conversation)")


def _client(chat: Chat, argument: str) -> None:
    if argument:
        chat.change_client(argument)
    names = chat.folder.config().names
    click.echo(f"({chat.client}; clients of this run: {', '.join(names)})")


def _routes(chat: Chat, argument: str) -> None:
    tokens = chat.routes()
    mean = sum(weight for _, weight in tokens) / len(tokens)
    click.echo(coloured(tokens))
    closed = "" if mean else f"; {nothing_to(chat.sides)}"
    click.echo(f"(weight of {chat.sides[0]}: mean {mean:.2f}; {WHOLE.legend}{closed})")


def _save(chat: Chat, argument: str) -> None:
    if not argument:
        raise UserError("/save: name a file")
    chat.save(resolve(argument, Path()))
    click.echo(f"(written to {argument})")


def _help(chat: Chat, argument: str) -> None:
    click.echo(HELP)


COMMANDS: dict[str, Callable[[Chat, str], None]] = {
    "/reset": _reset,
    "/system": _system,
    "/client": _client,
    "/routes": _routes,
    "/save": _save,
    "/help": _help,
}
