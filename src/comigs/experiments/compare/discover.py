"""Run folders below the given folders, and where a sweep has put each of them."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comigs.errors import UserError
from comigs.runs.report.read import Run, read_run

SWEEP = "sweep.toml"


@dataclass(frozen=True)
class Sweep:
    """What a sweep's sweep.toml says; axes: axis -> its values (they name the folders), in
    order.
    """

    folder: Path
    name: str
    baseline: str | None
    axes: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Found:
    """A run and its value on each axis of the sweep it belongs to; `place` is None outside a
    sweep.
    """

    run: Run
    place: Mapping[str, str] | None = None
    sweep: Sweep | None = None


def find_runs(paths: Sequence[Path]) -> list[Found]:
    """Every run in or below `paths`, each once: in a sweep's own order, else in order of the
    folders' names.

    Raises UserError for a path without any run, and for a run that cannot be read.
    """
    folders: dict[Path, Path] = {}  # resolved -> as given
    for path in paths:
        below = _run_folders(path)
        if not below:
            raise UserError(f"{path}: {_why_none(path)}")
        folders.update({folder.resolve(): folder for folder in reversed(below)})
    sweeps = {
        parent: _read_sweep(parent) for parent in {p for folder in folders for p in folder.parents}
    }
    found = [_place(_read(shown), resolved, sweeps) for resolved, shown in sorted(folders.items())]
    return sorted(found, key=_order)  # stable: folders' order outside sweeps


def common_folder(paths: Sequence[Path]) -> Path:
    """The deepest folder that holds all `paths` and is no run itself: where a comparison of them
    belongs.
    """
    common = Path(os.path.commonpath([os.path.abspath(path) for path in paths]))
    common = common.parent if is_run(common) else common
    return Path(os.path.relpath(common)) if common.is_relative_to(Path.cwd()) else common


def is_run(folder: Path) -> bool:
    """Whether a run has started here."""
    return (folder / "config.toml").is_file() and (folder / "metrics.jsonl").is_file()


def _run_folders(path: Path) -> list[Path]:
    """Without looking into runs and hidden folders (a run that is being made is hidden)."""
    runs = []
    for place, inside, _ in os.walk(path):
        if is_run(Path(place)):
            runs.append(Path(place))
            inside.clear()
        inside[:] = sorted(name for name in inside if not name.startswith("."))
    return runs


def _why_none(path: Path) -> str:
    if not path.exists():
        return "no such folder"
    if not path.is_dir():
        return "a file; give run folders, or folders that hold some"
    return "no run in it, nor below it (a run folder has a config.toml and a metrics.jsonl)"


def _read(folder: Path) -> Run:
    run = read_run(folder)
    clients = {client.name for client in run.config.clients}
    if run.summary is not None and run.summary.clients.keys() != clients:
        known = ", ".join(run.summary.clients) or "none"
        raise UserError(
            f"{folder / 'summary.json'}: clients: {known}; the run's config has {', '.join(sorted(clients))}"
        )
    return run


def _read_sweep(folder: Path) -> Sweep | None:
    path = folder / SWEEP
    if not path.is_file():
        return None
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
        if not isinstance(tree.get("axes", {}), dict):
            return None  # some other tool's
        axes = {str(axis): tuple(values) for axis, values in tree.get("axes", {}).items()}
        return Sweep(
            folder, str(tree.get("name", folder.name)), _baseline(tree.get("baseline")), axes
        )
    except (
        OSError,
        UnicodeDecodeError,
        tomllib.TOMLDecodeError,
        AttributeError,
        TypeError,
    ) as error:
        raise UserError(f"{path}: cannot be read as a sweep: {error}") from None


def _baseline(value: Any) -> str | None:
    """A value of an axis, or several, as a text."""
    parts = (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    )
    return "/".join(map(str, parts)) if value else None


def _place(run: Run, folder: Path, sweeps: Mapping[Path, Sweep | None]) -> Found:
    """The folders between sweep and run are its values on the axes, in their order; the last one is
    the seed's.
    """
    sweep = next((s for parent in folder.parents if (s := sweeps[parent])), None)
    if sweep:
        values = folder.relative_to(sweep.folder).parts[:-1]
        fits = len(values) == len(sweep.axes)
        if fits and all(
            v in allowed for v, allowed in zip(values, sweep.axes.values(), strict=True)
        ):
            return Found(run, dict(zip(sweep.axes, values, strict=True)), sweep)
    return Found(run)


def _order(found: Found) -> tuple[int, ...]:
    if found.sweep is None or found.place is None:
        return ()
    return tuple(found.sweep.axes[axis].index(value) for axis, value in found.place.items())
