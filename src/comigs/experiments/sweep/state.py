"""This module tells what is in a run's folder already.

That is nothing, or this run up to some round, or something that must not be touched.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from comigs.config import Config, dotted, resolve
from comigs.data.sources import source_names
from comigs.errors import UserError
from comigs.experiments.run_data import RunData
from comigs.files import ELSEWHERE, ClosedFolder, require_free
from comigs.processes import is_locked
from comigs.runs.folder import RunFolder
from comigs.runs.json_lines import read_timings
from comigs.runs.layout import LOCK, TIMINGS, is_run
from comigs.runs.reader import Reader
from comigs.text import plural

# fields that say where and how fast a run is, not what it is
PLACES = (
    *("version", "name", "base.threads", "workers", "data.root", "data.cache"),
    *("track.to", "track.names"),
)
AUTO = ("base.dtype", "base.device")  # a run has what was found where its config says "auto"
# a run has what was chosen where its config says base.memory
CHOSEN = ("client.micro_batch_size", "evaluation.batch_size", "base.recompute")


@dataclass(frozen=True)
class RunState:
    """A state says how far a run is.

    round: the last whole one. seconds: of all clients' training and measuring up to there.
    perplexity: of a finished run, the clients' mean on test. dtype: of its base.
    """

    round: int = 0
    begun: bool = False
    finished: bool = False
    seconds: float = 0.0
    perplexity: float | None = None
    dtype: str | None = None

    @property
    def word(self) -> str:
        """The state in the words of `comigs sweep`."""
        if self.finished:
            return "done"
        return "to resume" if self.begun else "new"


def look(path: Path, config: Config, packed: RunData | None = None) -> RunState:
    """Return how far the run of `config` at `path` is.

    packed: the run that was there, in packed form; a run folder goes before it. Raises UserError
    where something else is there.
    """
    # a run in packed form is finished, if it is this run at all
    if not os.path.lexists(path) and packed is not None:
        _require_same(path, config, packed.config)
        return _packed_state(packed)

    # what is no run, or one that this version cannot read, is somebody's
    if not os.path.lexists(path):
        require_free(path)
        return RunState()
    if not is_run(ClosedFolder(path)):
        raise UserError(
            f"{path}: exists and is no run folder; nothing was changed. "
            f"Move it away, or {ELSEWHERE}"
        )
    try:
        there = RunFolder.open(path, Reader(allow_code=True)).config()  # which imports no code
    except UserError as error:
        raise UserError(f"{error}; nothing was changed. Move {path} away, or {ELSEWHERE}") from None
    _require_same(path, config, there)
    return state_of(path)


def _require_same(path: Path, config: Config, there: Config) -> None:
    """Raise UserError where another run is there: it would be compared as if it had this config."""
    different = list(differences(config, there))
    if different:
        field, wanted, found = different[0]
        more = f" (and {plural(len(different) - 1, 'other field')})" if different[1:] else ""
        raise UserError(
            f"{path}: a run with another config is there: "
            f"{field} is {found} in it and {wanted} in this sweep{more}; "
            f"nothing was changed. Move it away, or {ELSEWHERE}"
        )


def _packed_state(run: RunData) -> RunState:
    """Return the state of a run in packed form."""
    seconds = sum(row["seconds"] or 0.0 for row in run.rounds)
    scores = [row["test_perplexity"] for row in run.clients if row["test_perplexity"] is not None]
    perplexity = fmean(scores) if scores else None
    dtype = run.config.base.dtype
    return RunState(run.config.rounds, True, True, seconds, perplexity, dtype)


def state_of(path: Path) -> RunState:
    """Return how far a run is that is known to be the right one.

    Raises UserError where it is damaged, or no run.
    """
    folder = RunFolder.open(path, Reader(allow_code=True))  # which imports no code
    last = folder.checkpoint()
    finished = last.finished and folder.files.has("summary.json")
    seconds, perplexity = _seconds(folder.files, last.timings_bytes), None
    if finished:
        perplexity = folder.summary().mean.test.perplexity
    dtype = folder.config().base.dtype
    return RunState(last.round, True, finished, seconds, perplexity, dtype)


def busy(path: Path) -> bool:
    """Return whether another process works on this run."""
    return is_locked(path / LOCK)


def differences(wanted: Config, there: Config) -> Iterator[tuple[str, str, str]]:
    """Give each field that would make it another run: its name, as wanted, as there.

    What a config leaves to us is filled in in a run, and is no difference; nor are paths that mean
    the same.
    """
    one, other = _fields(wanted), _fields(there)
    for field in dict.fromkeys((*one, *other)):
        a, b = one.get(field), other.get(field)
        if field in PLACES or (field in AUTO and a == "auto") or a == b:
            continue
        if field == "client.lr" and a is None and b in _default_rates():
            continue
        if field == "client.router_lr" and a is None and b == there.client.lr:
            continue
        if field in CHOSEN and wanted.base.memory is not None:
            continue
        if field == "conditions.machine" and a is None:  # measured
            continue
        yield field, _shown(a), _shown(b)


def _shown(value: Any) -> str:
    return "left out" if value is None else json.dumps(value, ensure_ascii=False)


def _default_rates() -> set[float]:
    """Return the learning rates that runs get whose configs give none: one for each base family."""
    # it imports transformers, and is needed only where a run is there already
    from comigs.bases.load import modules

    return {m.ARCHITECTURE.lr for m in modules().values() if hasattr(m, "ARCHITECTURE")}


def _fields(config: Config) -> dict[str, Any]:
    """Return every field by its path, clients by their names, text by the files it means."""
    tree = config.model_dump(mode="json")
    tree["clients"] = {client["name"]: client for client in tree["clients"]}
    fields = dict(dotted(tree))
    for field, value in fields.items():
        if field.startswith("clients.") and ".text" in field and isinstance(value, str):
            fields[field] = _meant(value, config.data.root)
    return fields | {"clients": list(tree["clients"])}


def _meant(text: str, root: Path) -> str:
    """Return `text` with its path, where it has one, whole: the same files from whatever root."""
    name, _, argument = text.partition(":")
    if name not in source_names() or not argument:
        return str(resolve(text, root).resolve())
    path = resolve(argument, root)
    return f"{name}:{path.resolve()}" if path.exists() else text


def _seconds(folder: ClosedFolder, length: int) -> float:
    """Return the seconds of all clients in all committed rounds.

    They are for estimates only: what cannot be read counts as 0.
    """
    try:
        timings = read_timings(folder.read(TIMINGS)[:length], str(folder.path / TIMINGS))
        return sum(timing.seconds or 0.0 for timing in timings)
    except (OSError, ValueError):
        return 0.0
