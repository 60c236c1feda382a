"""This module says what is asked for, before anything heavy of the extra `tasks` is imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from comigs.config import Split
from comigs.runs.tasks import LONGEST


@dataclass(frozen=True)
class TaskFiles:
    """Tasks of the harness that are asked for.

    names: YAML files, or names of tasks and groups that are in `folder`.
    folder: with task files; None: there is none. chat: questions go through the chat template.
    """

    names: Sequence[str]
    folder: Path | None = None
    chat: bool = False


@dataclass(frozen=True)
class OwnQuestions:
    """The clients' own questions are asked in this way.

    split: of this text. limit: of each client only so many, the first ones. longest: tokens of a
    written answer at most. shown: so many of each client are told, with what was answered.
    """

    split: Split = "test"
    limit: int | None = None
    longest: int = LONGEST
    shown: int = 0
