"""What a tracker is, and how it is found: a file of `trackers`, called as users type it."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from comigs.config import Config
from comigs.errors import UserError, nearest, require_extra
from comigs.files import ClosedFolder
from comigs.runs.track import trackers
from comigs.runs.track.curves import Row


@dataclass(frozen=True)
class Subject:
    """A tracker is told this of a run, beside its curves.

    id: of the run, for as long as its folder lives. name: for people. files: the run folder.
    settings: what the run was made with, without anything private.
    """

    id: str
    name: str
    files: ClosedFolder
    settings: dict[str, Any]


class Writer(Protocol):
    """A writer puts rows where people see them. Its methods raise whatever goes wrong."""

    def write(self, rows: Sequence[Row]) -> None:
        """Write rows, and leave out those that are there from an earlier start of the run."""

    def close(self, finished: bool) -> None:
        """Let go of the run. finished: nothing more will come."""


@dataclass(frozen=True)
class Tracker:
    """A tracker is where curves may go.

    packages: what must be installed. place: says where curves go, for people. open: begins, or
    goes on with, the one run of the tracker's that is this run; its writer is given all rows once
    more, from the first on.
    """

    packages: tuple[str, ...]
    place: Callable[[], str]
    open: Callable[[Subject], Writer]


def list_trackers() -> list[str]:
    """Return the names of the trackers in the folder."""
    return [module.name for module in pkgutil.iter_modules(trackers.__path__)]


def load_tracker(name: str) -> Tracker:
    """Return the tracker of that name. Raises UserError where it is unknown, or not installed."""
    known = list_trackers()
    if name not in known:
        raise UserError(
            f'track.to: unknown tracker "{name}".{nearest(name, known)} Known: {", ".join(known)}'
        )
    tracker: Tracker = importlib.import_module(f"{trackers.__name__}.{name}").TRACKER
    require_extra(name, tracker.packages, f'track.to: "{name}"')
    return tracker


def require_trackers(config: Config) -> None:
    """Raise UserError where a tracker that the config names is unknown or not installed."""
    named = config.track.to
    for name in named:
        load_tracker(name)
        if named.count(name) > 1:
            raise UserError(f'track.to: "{name}" is given twice; name each tracker once')


def say_where(config: Config) -> str:
    """Return a line on where curves go, and what is seen of clients there; "" for no tracker."""
    if not config.track.to:
        return ""
    parts = [f"{name} ({load_tracker(name).place()})" for name in config.track.to]
    seen = "by their names" if config.track.names else "as client-1, client-2, ..."
    return f"curves go to {', '.join(parts)}, clients {seen}"
