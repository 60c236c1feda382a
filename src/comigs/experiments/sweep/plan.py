"""From a sweep file to its runs, each with its config checked and what is on the disk of it known;
starts nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, product
from pathlib import Path

from comigs.config import Config, load_config
from comigs.errors import UserError, nearest
from comigs.experiments.sweep.spec import Sweep, read_sweep, to_toml
from comigs.experiments.sweep.state import RunState, look
from comigs.files import ELSEWHERE, write_whole, writing
from comigs.methods.method import load_method

COPY = "sweep.toml"  # in the sweep's folder; `comigs compare` reads the axes' order and the baseline there


@dataclass(frozen=True)
class Run:
    """One run of a sweep. label: its path in the sweep's folder. overrides: as for `--set`."""

    label: str
    path: Path
    choice: tuple[str, ...]
    source: Path
    overrides: tuple[str, ...]
    config: Config

    def words(self, verb: str, threads: int | None = None) -> list[str]:
        """`comigs VERB CONFIG --set ...`, as a list. threads: for base.threads, where it is
        given.
        """
        overrides = (*self.overrides, *([f"base.threads={threads}"] if threads is not None else []))
        return [
            verb,
            str(self.source),
            *(word for override in overrides for word in ("--set", override)),
        ]


@dataclass(frozen=True)
class Plan:
    """What is to be done. runs: in the order they start. states: what was on the disk, by label."""

    file: Path
    folder: Path
    sweep: Sweep
    runs: tuple[Run, ...]
    states: Mapping[str, RunState]


def read_plan(file: Path, out: Path | None = None, only: list[str] | None = None) -> Plan:
    """All runs of a sweep, or those with one of the texts `only` in their label; seeds are
    outermost.

    Raises UserError where anything is wrong with any of them, or with what is in their folders.
    Changes nothing.
    """
    sweep = read_sweep(file)
    folder = out if out is not None else Path("runs") / sweep.name
    _require_same_sweep(folder, sweep)
    runs = [
        _run(file, folder, sweep, choice, seed)
        for seed in sweep.seeds
        for names in product(*sweep.axes.values())
        if not _skipped(sweep, choice := dict(zip(sweep.axes, names, strict=True)))
    ]
    if not runs:
        raise UserError(f"{file}: skip: every run is skipped; leave one")
    chosen = tuple(run for run in runs if not only or any(text in run.label for text in only))
    if not chosen:
        raise UserError(
            f'--only {" --only ".join(only or [])}: in no run\'s path; one is "{runs[0].label}"'
        )
    return Plan(
        file, folder, sweep, chosen, {run.label: look(run.path, run.config) for run in chosen}
    )


def write_copy(plan: Plan) -> None:
    """Put the resolved sweep into its folder."""
    text = to_toml(plan.sweep, plan.file, plan.folder)
    with writing(plan.folder, ELSEWHERE):
        plan.folder.mkdir(parents=True, exist_ok=True)
        write_whole(
            plan.folder / COPY, lambda unfinished: unfinished.write_text(text, encoding="utf-8")
        )


def one_per_text(runs: list[Run]) -> list[Run]:
    """The first run of each distinct base and text, to prepare and check it once."""
    distinct: dict[str, Run] = {}
    for run in runs:
        base, data = run.config.base, run.config.data.model_dump(mode="json")
        text = [client.model_dump(include={"name", "text"}) for client in run.config.clients]
        distinct.setdefault(json.dumps((base.name, base.device, data, text)), run)
    return list(distinct.values())


def _skipped(sweep: Sweep, choice: Mapping[str, str]) -> bool:
    return any(entry.items() <= choice.items() for entry in sweep.skip)


def _run(file: Path, folder: Path, sweep: Sweep, choice: Mapping[str, str], seed: int) -> Run:
    written, where = sweep.config_of(choice)
    source = file.parent / written
    if not source.is_file():
        close = nearest(source.name, sorted(path.name for path in source.parent.glob("*.toml")))
        raise UserError(f"{file}: {where}: {source}: no such config file.{close}")
    layers = sweep.layers(choice, seed)
    config = _config(file, source, layers)
    names = (*choice.values(), f"seed-{seed}")
    overrides = tuple(override for layer in layers.values() for override in layer)
    return Run(
        "/".join(names), folder.joinpath(*names), tuple(choice.values()), source, overrides, config
    )


def _config(file: Path, source: Path, layers: Mapping[str, list[str]]) -> Config:
    """The config of a run. Raises UserError that names the place in the sweep file from which on it
    is wrong.
    """
    overrides = [override for layer in layers.values() for override in layer]
    if not (problem := _problem(source, overrides)):
        return load_config(source, overrides)
    if _problem(source, []) == problem:
        raise UserError(problem)  # of the config file itself
    so_far = dict(zip(layers, accumulate(layers.values()), strict=True))
    where = next(where for where in layers if _problem(source, so_far[where]) == problem)
    raise UserError(
        f"{file}: {where}: {problem.removeprefix(f'{source}: ').removeprefix('--set ')}"
    )


def _problem(source: Path, overrides: list[str]) -> str:
    """What is wrong with a config and its method; "" where nothing is."""
    try:
        load_method(load_config(source, overrides))
    except UserError as error:
        return str(error)
    return ""


def _require_same_sweep(folder: Path, sweep: Sweep) -> None:
    """Raises UserError where the folder is another sweep's: `compare` would no longer know that
    one's axes.
    """
    if not (folder / COPY).exists():
        return
    there = read_sweep(folder / COPY)
    for what, old, new in (
        ("name", there.name, sweep.name),
        ("axes", list(there.axes), list(sweep.axes)),
    ):
        if old != new:
            old, new = (
                value if isinstance(value, str) else ", ".join(value) or "none"
                for value in (old, new)
            )
            raise UserError(
                f"{folder}: is the folder of a sweep with {what} {old}, this one has {new}; {ELSEWHERE}"
            )
