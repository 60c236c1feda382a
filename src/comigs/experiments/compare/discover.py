"""This module finds the runs below folders, as run folders and in packed form, and says where a
sweep has put each of them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from comigs.config import read_toml
from comigs.errors import UserError
from comigs.experiments.packed import is_packed, read_packed
from comigs.experiments.run_data import RunData, read_run_folder

SWEEP = "sweep.toml"  # in a sweep's folder: a copy of its file


@dataclass(frozen=True)
class Sweep:
    """A sweep is what its sweep.toml says. axes: axis -> its values, in order; they name the
    folders of the runs.
    """

    folder: Path
    name: str
    baseline: str | None
    axes: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Found:
    """A run has a value on each axis of the sweep that it belongs to; `place` is None outside a
    sweep.
    """

    run: RunData
    place: Mapping[str, str] | None = None
    sweep: Sweep | None = None


def find_runs(paths: Sequence[Path]) -> list[Found]:
    """Return every run in or below `paths`, each once: in a sweep's own order, else in the order of
    the folders' names. A run that is there as a folder and in packed form is read from its folder.

    Raises UserError for a path without any run, and for a run that cannot be read.
    """
    # Whole paths tell whether two ways lead to one run; people see the way that they gave.
    folders: dict[Path, Path] = {}
    packed: dict[Path, RunData] = {}
    for path in paths:
        below, homes = _run_folders(path)
        inside = [run for home in homes for run in read_packed(home)]
        inside = [run for run in inside if run.folder.resolve().is_relative_to(path.resolve())]
        if not below and not inside:
            raise UserError(f"{path}: {_why_none(path)}")
        folders.update({folder.resolve(): folder for folder in reversed(below)})
        packed.update({run.folder.resolve(): run for run in inside})

    # A sweep.toml may lie in any folder above a run.
    known = sorted(folders.keys() | packed.keys())
    parents = {parent for place in known for parent in place.parents}
    sweeps = {parent: _read_sweep(parent) for parent in parents}
    found = []
    for place in known:
        run = read_run_folder(folders[place]) if place in folders else packed[place]
        found.append(_placed(run, place, sweeps))
    return sorted(found, key=_order)  # stable: the order of folders outside sweeps


def common_folder(paths: Sequence[Path]) -> Path:
    """Return the deepest folder that holds all `paths` and is no run itself: where a comparison of
    them belongs.
    """
    common = Path(os.path.commonpath([os.path.abspath(path) for path in paths]))
    if has_begun(common):
        common = common.parent
    return Path(os.path.relpath(common)) if common.is_relative_to(Path.cwd()) else common


def has_begun(folder: Path) -> bool:
    """Return whether a run has started here."""
    return (folder / "config.toml").is_file() and (folder / "metrics.jsonl").is_file()


def _run_folders(path: Path) -> tuple[list[Path], list[Path]]:
    """Return the run folders in or below a path, and the folders in, below or above it that hold
    packed runs.
    """
    runs = []
    homes = [parent for parent in path.parents if is_packed(parent)]
    for place, inside, _ in os.walk(path):
        folder = Path(place)
        if is_packed(folder):
            homes.append(folder)
        # Nothing is in a run but the run, and a run that is being made is hidden.
        if has_begun(folder):
            runs.append(folder)
            inside.clear()
        inside[:] = sorted(name for name in inside if not name.startswith("."))
    return runs, homes


def _why_none(path: Path) -> str:
    """Return why there is no run at a path."""
    if not path.exists():
        return "no such folder"
    if not path.is_dir():
        return "a file; give run folders, or folders that hold some"
    return "no run in it, nor below it (a run folder has a config.toml and a metrics.jsonl)"


def _read_sweep(folder: Path) -> Sweep | None:
    """Return the sweep whose folder this is; None where it is no sweep's."""
    path = folder / SWEEP
    if not path.is_file():
        return None
    tree = read_toml(path, "sweep")
    axes, baseline = tree.get("axes", {}), tree.get("baseline")
    if not isinstance(axes, dict):
        return None  # some other tool's
    for axis, values in axes.items():
        if not isinstance(values, dict):
            raise UserError(f"{path}: axes.{axis}: must be a section with a line for each value")
    values_of = {axis: tuple(values) for axis, values in axes.items()}
    return Sweep(folder, str(tree.get("name", folder.name)), baseline and str(baseline), values_of)


def _placed(run: RunData, folder: Path, sweeps: Mapping[Path, Sweep | None]) -> Found:
    """Return a run with its place in a sweep. The folders between sweep and run are its values on
    the axes, in their order; the last one is the seed's.
    """
    sweep = next((s for parent in folder.parents if (s := sweeps[parent])), None)
    if sweep is None:
        return Found(run)
    values = folder.relative_to(sweep.folder).parts[:-1]
    allowed = list(sweep.axes.values())
    if len(values) != len(allowed) or any(v not in a for v, a in zip(values, allowed, strict=True)):
        return Found(run)
    return Found(run, dict(zip(sweep.axes, values, strict=True)), sweep)


def _order(found: Found) -> tuple[int, ...]:
    """Return the place of a run in its sweep as numbers."""
    if found.sweep is None or found.place is None:
        return ()
    return tuple(found.sweep.axes[axis].index(value) for axis, value in found.place.items())
