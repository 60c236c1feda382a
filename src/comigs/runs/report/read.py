"""A run folder (docs/run-folder.md) as one frozen record, for whoever reads runs and makes none."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from comigs.config import Config, load_config
from comigs.errors import UserError
from comigs.runs.json_lines import parse_json, read_lines, read_record, read_timings
from comigs.runs.metrics import Absent, Evaluation, Line, RoundEnd, Summary, Timing, Train, Warned

OneKind = TypeVar("OneKind", bound=Line)


@dataclass(frozen=True)
class Run:
    """Everything in a run folder that a report needs.

    drift: the line that ends each round. summary: None while the run is unfinished.
    """

    folder: Path
    config: Config
    config_text: str
    environment: dict[str, Any]
    train: tuple[Train, ...]
    evaluations: tuple[Evaluation, ...]
    drift: tuple[RoundEnd, ...]
    warnings: tuple[Warned, ...]
    absent: tuple[Absent, ...]
    timings: tuple[Timing, ...]
    summary: Summary | None

    @property
    def clients(self) -> tuple[str, ...]:
        """Names as in the config, then whoever else appears in the metrics."""
        seen = [client.name for client in self.config.clients]
        seen += [line.client for line in (*self.train, *self.evaluations)]
        return tuple(dict.fromkeys(seen))

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
    config = load_config(folder / "config.toml")
    metrics = folder / "metrics.jsonl"
    try:
        lines = read_lines(metrics.read_bytes(), str(metrics))
    except FileNotFoundError:
        nothing = "missing; nothing has been measured in this run yet"
        raise UserError(f"{metrics}: {nothing}") from None
    except OSError as error:
        raise UserError(f"{metrics}: cannot be read: {error}") from None

    # Timings and summary come with time: a run that has just started has neither.
    timings, summary = folder / "timings.jsonl", folder / "summary.json"
    timed = read_timings(timings.read_bytes(), str(timings)) if timings.exists() else []
    result = None
    if summary.exists():
        result = read_record(Summary, _object(summary), str(summary))
    return Run(
        folder=folder,
        config=config,
        config_text=_text(folder / "config.toml"),
        environment=_object(folder / "env.json"),
        train=_of_kind(Train, lines),
        evaluations=_of_kind(Evaluation, lines),
        drift=_of_kind(RoundEnd, lines),
        warnings=_of_kind(Warned, lines),
        absent=_of_kind(Absent, lines),
        timings=tuple(timed),
        summary=result,
    )


def _of_kind(kind: type[OneKind], lines: list[Line]) -> tuple[OneKind, ...]:
    return tuple(line for line in lines if isinstance(line, kind))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        started = f"is {path.parent} the folder of a run that has started?"
        raise UserError(f"{path}: missing; {started}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def _object(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(_text(path).encode())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}: not JSON: {error.msg}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object, found {content!r}")
    return content
