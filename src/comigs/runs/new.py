"""Where a new run goes: what the user says, or the next free name, which is taken when chosen."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from comigs.config import Config
from comigs.files import ELSEWHERE, Taken, cache_folder
from comigs.processes import locked
from comigs.runs.folder import RunFolder


def free_folder(path: Path) -> Path:
    """Return `path`, or the first of `path-2`, `path-3`, ... that does not exist."""
    candidate, number = path, 1
    while os.path.lexists(candidate):
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def default_folder(config: Config) -> Path:
    """Return where a run goes by default, for now: two runs of one config may see the same name."""
    return free_folder(Path("runs") / config.name)


@contextmanager
def claimed(out: Path | None) -> Iterator[None]:
    """Let no other process of this user prepare a run for the same folder meanwhile.

    None: a default folder, for which many may be prepared. Raises UserError where somebody does.
    """
    name = hashlib.sha256(os.path.realpath(out or "").encode(errors="surrogateescape")).hexdigest()
    file = cache_folder() / "starting" / f"{name}.lock"
    with ExitStack() as held:
        if out is not None:
            taken = f"{out}: another process is starting a run there; nothing was changed. "
            # Without a place for the lock, who is second finds out only when the folder is made.
            with suppress(OSError):
                file.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(_claim(file, taken + ELSEWHERE))
        yield


@contextmanager
def _claim(file: Path, taken: str) -> Iterator[None]:
    with locked(file, taken):
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def new_folder(out: Path | None, config: Config, environment: Mapping[str, Any]) -> RunFolder:
    """Make the folder of a new run: `out`, or the default folder, as `RunFolder.create` does.

    Raises Taken where `out` is there already, and UserError.
    """
    if out is not None:
        return RunFolder.create(out, config, environment)

    # another run of the config may have taken the name since it was looked at
    while True:
        try:
            return RunFolder.create(default_folder(config), config, environment)
        except Taken:
            continue
