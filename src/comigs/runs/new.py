"""Where a new run goes: what the user says, or the next free name, which is taken when chosen."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comigs.config import Config
from comigs.files import Taken
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
