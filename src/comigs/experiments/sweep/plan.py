"""This module makes the runs of a sweep file, each checked and looked up on the disk.

It starts nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from comigs.config import Config, load_config, resolve
from comigs.errors import UserError, nearest
from comigs.experiments.compare.discover import SWEEP
from comigs.experiments.packed import is_packed, read_packed
from comigs.experiments.sweep.spec import Sweep, read_sweep, to_toml
from comigs.experiments.sweep.state import RunState, look
from comigs.files import ELSEWHERE, ClosedFolder, write_whole, writing
from comigs.methods.loading import load_method


@dataclass(frozen=True)
class Run:
    """A run of a sweep.

    label: its path in the sweep's folder. choice: the name of its value on each axis. source: the
    run TOML that it starts from. overrides: as for `--set`.
    """

    label: str
    path: Path
    choice: tuple[str, ...]
    source: Path
    overrides: tuple[str, ...]
    config: Config

    def words(self, verb: str, threads: int | None = None) -> list[str]:
        """Return the words of `comigs VERB CONFIG --set ...`.

        threads: what base.threads is set to. None: it stays as the overrides have it.
        """
        words = [verb, str(self.source)]
        for override in self.overrides:
            words += ["--set", override]
        if threads is not None:
            words += ["--set", f"base.threads={threads}"]
        return words


@dataclass(frozen=True)
class Plan:
    """A plan says what a sweep has to do.

    runs: in the order in which they start. states: what was on the disk of each, by label.
    """

    file: Path
    folder: Path
    sweep: Sweep
    runs: tuple[Run, ...]
    states: Mapping[str, RunState]


def read_plan(file: Path, out: Path | None = None, only: list[str] | None = None) -> Plan:
    """Return the runs of a sweep, or those with one of the texts `only` in their label.

    out: the sweep's folder; None: runs/NAME. Raises UserError where anything is wrong with any of
    the runs, or with what is in their folders. Changes nothing.
    """
    sweep = read_sweep(file)
    folder = out if out is not None else Path("runs") / sweep.name
    _require_same_sweep(folder, sweep)

    # seeds are outermost: a sweep that is stopped early has all settings with one seed
    runs = []
    for seed in sweep.seeds:
        for names in product(*sweep.axes.values()):
            choice = dict(zip(sweep.axes, names, strict=True))
            if not any(entry.items() <= choice.items() for entry in sweep.skip):
                runs.append(_run(file, folder, sweep, choice, seed))
    if not runs:
        raise UserError(f"{file}: skip: every run is skipped; leave one")

    # a text of `only` that fits nothing is a slip of the pen
    chosen = []
    for run in runs:
        if not only or any(text in run.label for text in only):
            chosen.append(run)
    if not chosen:
        given = " --only ".join(only or [])
        raise UserError(f'--only {given}: in no run\'s path; one is "{runs[0].label}"')

    # a sweep's folder may be somebody else's: no link in it leads out of it
    for run in chosen:
        with suppress(FileNotFoundError, NotADirectoryError):
            ClosedFolder(folder).refuse_link(run.label)

    # runs that were packed have no folder any more
    packed = {}
    if is_packed(folder):
        packed = {run.folder: run for run in read_packed(folder)}
    states = {run.label: look(run.path, run.config, packed.get(run.path)) for run in chosen}
    return Plan(file, folder, sweep, tuple(chosen), states)


def write_copy(plan: Plan) -> None:
    """Put the sweep, as it was resolved, into its folder."""
    text = to_toml(plan.sweep, plan.file, plan.folder)
    with writing(plan.folder, ELSEWHERE):
        plan.folder.mkdir(parents=True, exist_ok=True)
        write_whole(plan.folder / SWEEP, lambda path: path.write_text(text, encoding="utf-8"))


def one_per_text(runs: list[Run]) -> list[Run]:
    """Return the first run of each distinct base and text, to prepare and check it once."""
    distinct: dict[str, Run] = {}
    for run in runs:
        base, data = run.config.base, run.config.data.model_dump(mode="json")
        text = [client.model_dump(include={"name", "text"}) for client in run.config.clients]
        distinct.setdefault(json.dumps((base.name, base.device, data, text)), run)
    return list(distinct.values())


def _run(file: Path, folder: Path, sweep: Sweep, choice: Mapping[str, str], seed: int) -> Run:
    # a missing file is said with the place in the sweep that names it
    written, where = sweep.config_of(choice)
    try:
        source = resolve(written, file.parent)
    except UserError as error:
        raise UserError(f"{file}: {where}: {error}") from None
    if not source.is_file():
        close = nearest(source.name, sorted(path.name for path in source.parent.glob("*.toml")))
        raise UserError(f"{file}: {where}: {source}: no such config file.{close}")

    overrides: list[str] = []
    for layer in sweep.layers(choice, seed).values():
        overrides += layer
    if problem := _problem(source, overrides):
        raise UserError(_placed(problem, file, source, sweep.layers(choice, seed)))
    names = (*choice.values(), f"seed-{seed}")
    return Run(
        label="/".join(names),
        path=folder.joinpath(*names),
        choice=tuple(choice.values()),
        source=source,
        overrides=tuple(overrides),
        config=load_config(source, overrides),
    )


def _problem(source: Path, overrides: list[str]) -> str:
    """Return what is wrong with a config and its method; "" where nothing is."""
    try:
        load_method(load_config(source, overrides))
    except UserError as error:
        return str(error)
    return ""


def _placed(problem: str, file: Path, source: Path, layers: Mapping[str, list[str]]) -> str:
    """Return a run's problem with the place in the sweep file from which on it is there."""
    overrides: list[str] = []
    if _problem(source, overrides) == problem:
        return problem  # of the config file itself
    place = ""
    for where, layer in layers.items():
        overrides += layer
        if not place and _problem(source, overrides) == problem:
            place = where
    return f"{file}: {place}: {problem.removeprefix(f'{source}: ').removeprefix('--set ')}"


def _require_same_sweep(folder: Path, sweep: Sweep) -> None:
    """Raise UserError where the folder is another sweep's, whose axes `compare` would forget."""
    if not (folder / SWEEP).exists():
        return
    there = read_sweep(folder / SWEEP)
    for what, old, new in (
        ("name", there.name, sweep.name),
        ("axes", ", ".join(there.axes) or "none", ", ".join(sweep.axes) or "none"),
    ):
        if old != new:
            raise UserError(
                f"{folder}: is the folder of a sweep with {what} {old}, this one has {new}; "
                f"{ELSEWHERE}"
            )
