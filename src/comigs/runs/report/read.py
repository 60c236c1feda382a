"""A run folder (docs/run-folder.md) as one frozen record, for whoever reads runs and makes none."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from comigs.config import Config, load_config
from comigs.errors import UserError
from comigs.files import ClosedFolder
from comigs.methods.loading import load_method
from comigs.runs.json_lines import parse_json, read_lines, read_record, read_timings
from comigs.runs.layout import METRICS, TIMINGS, require_no_links
from comigs.runs.metrics import (
    Absent,
    Evaluation,
    Kept,
    Line,
    RoundEnd,
    Summary,
    Timing,
    Train,
    Warned,
)
from comigs.runs.simulated import Attempt, Exchange
from comigs.runs.tasks import Tasks, read_tasks

OneKind = TypeVar("OneKind", bound=Line)


@dataclass(frozen=True)
class Run:
    """Everything in a run folder that a report needs.

    kept: what each personal model is, in a finished run that keeps the best rounds. ends: the line
    that ends each round. exchanges, attempts: of a run with simulated devices. summary: None while
    the run is unfinished.
    """

    folder: Path
    config: Config
    config_text: str
    environment: dict[str, Any]
    train: tuple[Train, ...]
    evaluations: tuple[Evaluation, ...]
    kept: tuple[Kept, ...]
    ends: tuple[RoundEnd, ...]
    warnings: tuple[Warned, ...]
    absent: tuple[Absent, ...]
    exchanges: tuple[Exchange, ...]
    attempts: tuple[Attempt, ...]
    timings: tuple[Timing, ...]
    summary: Summary | None
    tasks: Tasks

    @property
    def clients(self) -> tuple[str, ...]:
        """Names as in the config, then whoever else appears in the metrics."""
        seen = self.config.names + [line.client for line in (*self.train, *self.evaluations)]
        return tuple(dict.fromkeys(seen))

    @cached_property
    def beside_others(self) -> bool:
        """Whether everybody's generalist is beside clients' own experts, as the last of them.

        A report imports no method of whoever made the run, of which nothing is known here; nor of a
        run that would be refused today.
        """
        if "." in self.config.method:
            return False
        try:
            return load_method(self.config).beside_others(self.config)
        except UserError:
            return False

    @property
    def last_round(self) -> int:
        """The last round of which something was written; 0 before the first."""
        return max((line.round for line in (*self.train, *self.evaluations)), default=0)


def read_run(folder: str | Path) -> Run:
    """Read one run folder, which may be of a run that is still going.

    Raises UserError with one line naming the file (and line) that is missing or not as
    docs/run-folder.md says.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder")
    closed = ClosedFolder(folder)
    require_no_links(closed)
    config = load_config(folder / "config.toml", own=False)
    metrics = folder / METRICS
    try:
        lines = read_lines(closed.read(METRICS), str(metrics))
    except FileNotFoundError:
        nothing = "missing; nothing has been measured in this run yet"
        raise UserError(f"{metrics}: {nothing}") from None
    except OSError as error:
        raise UserError(f"{metrics}: cannot be read: {error.strerror}") from None

    # Timings and summary come with time: a run that has just started has neither.
    timed, result = list[Timing](), None
    if closed.has(TIMINGS):
        timed = read_timings(closed.read(TIMINGS), str(folder / TIMINGS))
    if closed.has("summary.json"):
        result = read_record(Summary, _object(closed, "summary.json"), str(folder / "summary.json"))
    return Run(
        folder=folder,
        config=config,
        config_text=_text(closed, "config.toml"),
        environment=_object(closed, "env.json"),
        train=_of_kind(Train, lines),
        evaluations=_of_kind(Evaluation, lines),
        kept=_of_kind(Kept, lines),
        ends=_of_kind(RoundEnd, lines),
        warnings=_of_kind(Warned, lines),
        absent=_of_kind(Absent, lines),
        exchanges=_of_kind(Exchange, lines),
        attempts=_of_kind(Attempt, lines),
        timings=tuple(timed),
        summary=result,
        tasks=read_tasks(closed),
    )


def _of_kind(kind: type[OneKind], lines: list[Line]) -> tuple[OneKind, ...]:
    return tuple(line for line in lines if isinstance(line, kind))


def _text(folder: ClosedFolder, name: str) -> str:
    path = folder.path / name
    try:
        return folder.read(name).decode("utf-8")
    except FileNotFoundError:
        started = f"is {folder.path} the folder of a run that has started?"
        raise UserError(f"{path}: missing; {started}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def _object(folder: ClosedFolder, name: str) -> dict[str, Any]:
    path = folder.path / name
    try:
        content = parse_json(_text(folder, name).encode())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}: not JSON: {error.msg}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object, found {content!r}")
    return content
