"""This module says what is asked for, before anything heavy of the extra `tasks` is imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from comigs.errors import UserError


@dataclass(frozen=True)
class TaskFiles:
    """Tasks of the harness that are asked for.

    names: YAML files, or names of tasks and groups that are in `folder`.
    folder: with task files; None: there is none. chat: questions go through the chat template.
    """

    names: Sequence[str]
    folder: Path | None = None
    chat: bool = False


def require_extra(module: str) -> None:
    """Raise UserError where a package of the extra is not installed."""
    if find_spec(module) is None:
        raise UserError(f"tasks: {module} is not installed; run: pip install 'comigs[tasks]'")
