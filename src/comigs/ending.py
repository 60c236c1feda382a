"""How a command ends: what a user did wrong is one line and exit code 2, Ctrl-C is 130, a bug of ours a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import click

from comigs.errors import Stopped, UserError


def exit_code(command: Callable[[], object]) -> int:
    """Run a command of click's; say what is to be said about its end."""
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
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        return _say(f"error: {error.filename}: {error.strerror}", 2)
    if code == Stopped.exit_code:  # also what typer makes of a Ctrl-C
        return _say("stopped", Stopped.exit_code)
    return code if isinstance(code, int) else 0


def _say(message: str, code: int) -> int:
    print(" ".join(message.splitlines()), file=sys.stderr)
    return code
