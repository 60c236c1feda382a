"""The packed form of many runs: a few files instead of a folder for each run.

runs.csv has a row for each client of each run, rounds.csv.gz a row for each round of each client,
tasks.csv, where any were done, a row for each measure of a task, and environment.json the configs
and environments that runs.csv refers to by their numbers.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from comigs.config import Config, parse_config, place, relative
from comigs.errors import UserError
from comigs.experiments.csv_file import Row, from_csv, to_csv
from comigs.experiments.run_data import (
    CLIENT,
    ROUND,
    SIMULATED,
    TASK,
    TASK_LATER,
    TOKENS,
    WHOLE,
    RunData,
    require_clients,
)
from comigs.files import write_files, writing

RUNS, ROUNDS, ENVIRONMENT = "runs.csv", "rounds.csv.gz", "environment.json"
PACKED = (RUNS, ROUNDS, ENVIRONMENT)
TASKS = "tasks.csv"  # beside them, where any run was asked tasks
HEAD = ("config", "environment", "seed")  # of a run, in each of its rows


def is_packed(folder: Path) -> bool:
    """Return whether runs in packed form are here."""
    return (folder / ENVIRONMENT).is_file() and (folder / RUNS).is_file()


def read_packed(folder: Path) -> list[RunData]:
    """Return the runs that a folder holds in packed form, in their order; each run's folder is
    where it was before it was packed.

    Raises UserError that names the file, the line and the column that cannot be read.
    """
    configs, environments = _read_environment(folder / ENVIRONMENT, folder)
    # A file that is damaged is named before anything is made of the others.
    columns: dict[str, type] = {"run": str, **dict.fromkeys(HEAD, int), **CLIENT}
    needed = ("run", *HEAD, "client", *WHOLE, *TOKENS)
    clients = from_csv(folder / RUNS, _read(folder / RUNS), columns, needed)
    text = _read(folder / ROUNDS, gzip.decompress)
    rounds = from_csv(
        folder / ROUNDS, text, {"run": str, **ROUND}, ("run", "round"), later=SIMULATED
    )
    tasks: list[Row] = []
    if (folder / TASKS).is_file():
        figures = ("run", "client", "task", "measure", "items", "base", "personal")
        text = _read(folder / TASKS)
        tasks = from_csv(folder / TASKS, text, {"run": str, **TASK}, figures, later=TASK_LATER)
    labels = {row["run"] for row in clients}
    of_round = _by_run(rounds, folder / ROUNDS, labels)
    of_task = _by_run(tasks, folder / TASKS, labels)

    # The rows of a run say the same of it, and point at entries that are there.
    heads: dict[str, tuple[int, int, int]] = {}
    of_client: dict[str, list[Row]] = {}
    known = {"config": len(configs), "environment": len(environments)}
    for line, row in enumerate(clients, start=2):
        own = tuple(row[column] for column in HEAD)
        first = heads.setdefault(row["run"], own)
        for column, value, expected in zip(HEAD, own, first, strict=True):
            where = f"{folder / RUNS}: line {line}: column {column}: {value}"
            if value != expected:
                raise UserError(f"{where}; the first line of the run has {expected}")
            if column in known and not 1 <= value <= known[column]:
                raise UserError(f"{where}; {ENVIRONMENT} has 1 to {known[column]}")
        of_client.setdefault(row["run"], []).append(row)
    runs = []
    for label, (config, environment, seed) in heads.items():
        run = RunData(
            folder=folder / label,
            config=configs[config - 1].model_copy(update={"seed": seed}),
            environment=environments[environment - 1],
            finished=True,
            last_round=configs[config - 1].rounds,
            clients=tuple(of_client[label]),
            rounds=tuple(of_round.get(label, ())),
            tasks=tuple(of_task.get(label, ())),
        )
        require_clients(folder / RUNS, [row["client"] for row in run.clients], run.config)
        runs.append(run)
    return runs


def write_packed(runs: Sequence[RunData], home: Path, out: Path) -> None:
    """Write runs below `home` into `out` in packed form. Run folders stay as they are.

    Raises UserError where one of the files is there already.
    """
    there = [out / name for name in (*PACKED, TASKS) if (out / name).exists()]
    if there:
        raise UserError(f"{there[0]}: exists already; nothing was changed. Move it away")
    configs: dict[str, int] = {}
    environments: dict[str, int] = {}
    clients: list[Row] = []
    rounds: list[Row] = []
    tasks: list[Row] = []
    for run in runs:
        label = os.path.relpath(run.folder.resolve(), home.resolve())
        # Seeds and commands differ from run to run: without them many runs share one entry.
        tree = relative(run.config, out).model_dump(mode="json", exclude_none=True)
        del tree["seed"]
        environment = {name: v for name, v in run.environment.items() if name != "command"}
        head = {
            "run": label,
            "setting": os.path.dirname(label) or label,
            "method": run.config.method,
            "seed": run.config.seed,
            "commit": environment.get("commit"),
            "versions": _versions(environment),
            "config": _number(tree, configs),
            "environment": _number(environment, environments),
        }
        clients += [head | _cells(row, CLIENT) for row in run.clients]
        rounds += [{"run": label} | _cells(row, ROUND) for row in run.rounds]
        tasks += [{"run": label} | _cells(row, TASK) for row in run.tasks]
    # One entry a line: a change of one config is a change of one line.
    listed = ",\n".join(configs), ",\n".join(environments)
    kinds = '{{\n"configs": [\n{}\n],\n"environments": [\n{}\n]\n}}\n'.format(*listed)
    contents = {
        ROUNDS: gzip.compress(to_csv(rounds).encode(), mtime=0),
        **({TASKS: to_csv(tasks).encode()} if tasks else {}),
        RUNS: to_csv(clients).encode(),
        ENVIRONMENT: kinds.encode(),
    }
    # environment.json is the last one, as it says that the others are whole.
    with writing(out, "choose another folder with --out"):
        write_files(out, contents)


def _cells(row: Row, columns: Mapping[str, type]) -> Row:
    """Return the cells of a row for these columns; what it does not say is None."""
    return {name: row.get(name) for name in columns}


def _by_run(rows: Sequence[Row], path: Path, known: Collection[str]) -> dict[str, list[Row]]:
    """Return run -> its rows. Raises UserError where a row is of no run that is known."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["run"], []).append(row)
    for label in found.keys() - known:
        raise UserError(f"{path}: column run: {label} is not in {RUNS}")
    return found


def _read_environment(path: Path, folder: Path) -> tuple[list[Config], list[dict[str, Any]]]:
    """Return the configs and environments of packed runs. Raises UserError."""
    try:
        tree = json.loads(_read(path))
        configs = []
        for number, entry in enumerate(tree["configs"], start=1):
            source = f"{path}: configs: {number}"
            place(entry, folder, source)
            configs.append(parse_config(entry, source))
        return configs, [dict(entry) for entry in tree["environments"]]
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}: not JSON: {error.msg}") from None
    except RecursionError:
        raise UserError(f"{path}: damaged: lists or objects are nested too deeply") from None
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged: no list of configs and environments: {error}") from None


def _read(path: Path, unpack: Callable[[bytes], bytes] = bytes) -> str:
    """Return the text of a packed file. Raises UserError where it cannot be read."""
    try:
        return unpack(path.read_bytes()).decode("utf-8-sig")  # as spreadsheets write it
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def _number(entry: Mapping[str, Any], known: dict[str, int]) -> int:
    """Return the number of an entry among the known ones, from 1; a new one is added."""
    return known.setdefault(json.dumps(entry, ensure_ascii=False), len(known) + 1)


def _versions(environment: Mapping[str, Any]) -> str | None:
    """Return the versions of an environment in one cell: comigs 0.1.0, torch 2.13.0."""
    versions = environment.get("versions")
    if not isinstance(versions, Mapping):
        return None
    return ", ".join(f"{name} {version}" for name, version in versions.items())
