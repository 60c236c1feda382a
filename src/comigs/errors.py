"""This module holds the errors that a user makes, as opposed to bugs of ours."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence


class UserError(ValueError):
    """A user error is one line for the user: which field or file, what was given, what to do.

    The command line prints the line and exits with `exit_code`. A bug of ours is never a
    `UserError`.
    """

    exit_code = 2


class Stopped(UserError):
    """A run was stopped on purpose (Ctrl-C); the line says how to go on with it."""

    exit_code = 130


def require_extra(extra: str, modules: Sequence[str], what: str) -> None:
    """Raise UserError where modules of an extra are not installed, which `what` needs."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{what} needs {', '.join(missing)}: pip install 'comigs[{extra}]'")


def nearest(name: str, allowed: list[str]) -> str:
    """Return ' Did you mean "x"?' for the allowed name closest to `name`; '' where none is."""
    from difflib import get_close_matches

    close = get_close_matches(name, allowed, n=1, cutoff=0.5)
    return f' Did you mean "{close[0]}"?' if close else ""


def require_finite(option: str, given: float, more: str = "") -> None:
    """Raise UserError for what is given to an option and is no number, or one without end.

    more: what else it must be, after a comma.
    """
    if not math.isfinite(given):
        raise UserError(f"{option}: given {given}; must be a finite number{more}")


def require_utf8(what: str, given: str) -> None:
    """Raise UserError for a text that came in bytes that are no UTF-8."""
    if any("\ud800" <= c <= "\udfff" for c in given):
        raise UserError(f"{what}: not valid UTF-8; write it in a UTF-8 terminal")
