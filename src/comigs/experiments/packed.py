"""A run as data, and the packed form of many runs: three files instead of a folder for each run.

runs.csv has a row for each client of each run, rounds.csv.gz a row for each round of each client,
and environment.json the configs and environments that runs.csv refers to by their numbers.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from comigs.config import SPLITS, Config, parse_config, place, relative
from comigs.errors import UserError
from comigs.experiments.csv_file import Row, from_csv, to_csv
from comigs.files import write_files, writing
from comigs.runs.metrics import ClientSummary
from comigs.runs.report.read import Run, read_run
from comigs.runs.report.timeline import worked_tokens

RUNS, ROUNDS, ENVIRONMENT = "runs.csv", "rounds.csv.gz", "environment.json"
PACKED = (RUNS, ROUNDS, ENVIRONMENT)
HEAD = ("config", "environment", "seed")  # of a run, in each of its rows
Metric = Literal["perplexity", "nats_per_token", "bits_per_byte"]
METRICS: tuple[Metric, ...] = ("perplexity", "nats_per_token", "bits_per_byte")
WHOLE = ("uploaded_bytes", "downloaded_bytes")  # of a whole run, and known of every client
TOKENS = ("trained_tokens", "router_tokens")
SHAPE = ("trained_parameters", "generalists", "specialists", "rank", "specialist_rank")
CLIENT: dict[str, type] = {
    "client": str,
    **{f"base_test_{metric}": float for metric in METRICS},
    **{f"test_{metric}": float for metric in METRICS},
    "test_tokens": int,
    **dict.fromkeys((*WHOLE, *SHAPE, *TOKENS, "peak_memory_bytes"), int),
    "weights": str,
}
ROUND: dict[str, type] = {
    "round": int,
    "client": str,
    "train_loss": float,
    **{f"{split}_{metric}": float for split in SPLITS for metric in METRICS},
    **dict.fromkeys(("adopted_share", "drift", "tokens_per_second", "seconds"), float),
    "warning": str,
    "absent": str,
    "simulated_seconds": float,
    **dict.fromkeys(("worked_tokens", "lost_tokens"), int),
}
SIMULATED = ("simulated_seconds", "worked_tokens", "lost_tokens")  # files from before have none


@dataclass(frozen=True)
class RunData:
    """What comparisons and sweeps know of a run.

    clients: a row for each client of a finished run, with the columns CLIENT. rounds: a row for
    each client and round, with the columns ROUND; a row without a client is the server's, and round
    0 measures the untouched base.
    """

    folder: Path
    config: Config
    environment: Mapping[str, Any]
    finished: bool
    last_round: int
    clients: tuple[Row, ...]
    rounds: tuple[Row, ...]


def read_run_folder(folder: Path) -> RunData:
    """Return a run from its folder. Raises UserError where the folder cannot be read."""
    run = read_run(folder)
    rows = tuple(_client(run, *each) for each in run.summary.clients.items()) if run.summary else ()
    if run.summary is not None:
        _require_clients(folder / "summary.json", [row["client"] for row in rows], run.config)
    return RunData(
        folder=folder,
        config=run.config,
        environment=run.environment,
        finished=run.summary is not None,
        last_round=run.last_round,
        clients=rows,
        rounds=_rounds(run),
    )


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
    of_round: dict[str, list[Row]] = {}
    for row in rounds:
        of_round.setdefault(row["run"], []).append(row)
    for label in of_round.keys() - {row["run"] for row in clients}:
        raise UserError(f"{folder / ROUNDS}: column run: {label} is not in {RUNS}")

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
        )
        _require_clients(folder / RUNS, [row["client"] for row in run.clients], run.config)
        runs.append(run)
    return runs


def write_packed(runs: Sequence[RunData], home: Path, out: Path) -> None:
    """Write runs below `home` into `out` in packed form. Run folders stay as they are.

    Raises UserError where one of the files is there already.
    """
    there = [out / name for name in PACKED if (out / name).exists()]
    if there:
        raise UserError(f"{there[0]}: exists already; nothing was changed. Move it away")
    configs: dict[str, int] = {}
    environments: dict[str, int] = {}
    clients: list[Row] = []
    rounds: list[Row] = []
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
    # One entry a line: a change of one config is a change of one line.
    listed = ",\n".join(configs), ",\n".join(environments)
    kinds = '{{\n"configs": [\n{}\n],\n"environments": [\n{}\n]\n}}\n'.format(*listed)
    contents = {
        ROUNDS: gzip.compress(to_csv(rounds).encode(), mtime=0),
        RUNS: to_csv(clients).encode(),
        ENVIRONMENT: kinds.encode(),
    }
    # environment.json is the last one, as it says that the others are whole.
    with writing(out, "choose another folder with --out"):
        write_files(out, contents)


def _client(run: Run, name: str, result: ClientSummary) -> Row:
    """Return the row of a client: what it came to, and what it took."""
    row: Row = {"client": name}
    for metric in METRICS:
        row[f"base_test_{metric}"] = getattr(result.base_test, metric)
        row[f"test_{metric}"] = getattr(result.test, metric)
    trained = [line for line in run.train if line.client == name]
    peaks = [t.peak_memory_bytes for t in run.timings if t.client == name]
    return row | {
        "test_tokens": result.test.tokens,
        **{column: getattr(result, column) for column in (*WHOLE, *SHAPE)},
        "trained_tokens": sum(line.trained_tokens for line in trained),
        "router_tokens": sum(line.router_tokens for line in trained),
        "peak_memory_bytes": max((p for p in peaks if p is not None), default=None),
        "weights": run.summary.weights if run.summary else None,
    }


def _rounds(run: Run) -> tuple[Row, ...]:
    """Return the rows of a run's rounds, round by round."""
    rows: dict[tuple[int, str], Row] = {}

    def at(round_: int, client: str | None) -> Row:
        new = {"round": round_, "client": client}
        return rows.setdefault((round_, client or ""), new)

    # Different lines of the metrics say different things of the same round.
    for t in run.train:
        at(t.round, t.client).update(
            train_loss=t.train_nats_per_token, adopted_share=t.adopted_share
        )
    for e in run.evaluations:
        if e.model == ("personal" if e.round else "base"):
            measured = {f"{e.split}_{metric}": getattr(e.score, metric) for metric in METRICS}
            at(e.round, e.client).update(measured)
    for d in run.drift:
        at(d.round, None)["drift"] = d.drift
    for time in run.timings:
        speed = {"tokens_per_second": time.tokens_per_second, "seconds": time.seconds}
        at(time.round, time.client).update(speed)
    # Of simulated devices: when the round ended, and how much of what was done was for nothing.
    for exchange in run.exchanges:
        at(exchange.round, None)["simulated_seconds"] = exchange.ended
    worked, counted = worked_tokens(run)
    for number, tokens in worked.items():
        lost = {"worked_tokens": tokens, "lost_tokens": tokens - counted.get(number, 0)}
        at(number, None).update(lost)
    # A round may show several signs of failure, and one cell has them all.
    for w in run.warnings:
        row = at(w.round, w.client)
        row["warning"] = "; ".join(filter(None, (row.get("warning"), f"{w.sign}: {w.message}")))
    for a in run.absent:
        at(a.round, a.client)["absent"] = a.reason
    return tuple(sorted(rows.values(), key=lambda row: row["round"]))


def _cells(row: Row, columns: Mapping[str, type]) -> Row:
    """Return the cells of a row for these columns; what it does not say is None."""
    return {name: row.get(name) for name in columns}


def _require_clients(path: Path, names: Sequence[str], config: Config) -> None:
    """Raise UserError where a result is of other clients than the run's config has."""
    known = sorted(client.name for client in config.clients)
    if sorted(names) != known:
        found = ", ".join(names) or "none"
        raise UserError(f"{path}: clients: {found}; the run's config has {', '.join(known)}")


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
