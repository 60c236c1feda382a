"""This module ends a command: with a result, or with one line for the user and an exit code.

A user's mistake is exit code 2, Ctrl-C is 130, and a bug of ours is a traceback.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from comigs.errors import Stopped, UserError

if TYPE_CHECKING:
    from comigs.app.console import Console


def finish(path: Path, console: Console, federated: bool) -> None:
    """Show the table of clients, the page, and what to do next.

    federated: the clients' own models are on their devices.
    """
    from comigs.files import ClosedFolder, command
    from comigs.runs.report.kept_models import kept_lines
    from comigs.runs.report.page import write_report
    from comigs.runs.report.read import read_run
    from comigs.runs.report.tables import client_table

    # the page is written before anything of it is shown
    page = write_report(path)
    run = read_run(path)
    console.table(client_table(run, brief=True))
    for line in kept_lines(run):
        console.say(f"kept:   {line}")
    console.result(f"report: {page}")

    # a device knows a run by its id alone
    if federated:
        from comigs.federation.messages import RUN_ID

        there = ClosedFolder(path).read(RUN_ID).decode("utf-8")
        console.say(f"next:   each client's own model is on its device, in runs/{there}")
    else:
        console.say(f'next:   {command("generate", path)} --client {run.clients[0]} --prompt "..."')


def exit_code(command: Callable[[], object]) -> int:
    """Run a command of click's, say what is to be said about its end, and return its exit code."""
    # what a user can do something about is one line; all else goes on as a traceback
    try:
        code = command()
    except Stopped as stop:
        return _say(f"stopped: {stop}", stop.exit_code)
    except UserError as error:
        return _say(f"error: {error}", error.exit_code)
    except click.exceptions.NoArgsIsHelpError:  # `comigs` alone: it has shown the help
        return 2
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        known = context.command_path if context else "comigs"
        return _say(f"error: {error.format_message()} (try: {known} --help)", 2)
    except (KeyboardInterrupt, click.Abort):
        code = Stopped.exit_code
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        _drop_output()
        return 1
    except RuntimeError as error:  # torch's, which is not imported for a word of help
        if type(error).__name__ != "OutOfMemoryError":
            raise
        from comigs.text import brief

        return _say(f"error: the memory of the device is full: {brief(str(error))}", 2)
    except OSError as error:
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT):
            _drop_output()
            return _say("error: no space left on the disk that this is written to", 2)
        if error.filename is None:
            raise
        return _say(f"error: {error.filename}: {error.strerror}", 2)

    # typer makes a code of some interrupts itself
    if code == Stopped.exit_code:
        return _say("stopped", Stopped.exit_code)
    return code if isinstance(code, int) else 0


def _drop_output() -> None:
    """Let what is still to be written out fail no more when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _say(message: str, code: int) -> int:
    from comigs.text import one_line

    print(one_line(message), file=sys.stderr)
    return code
