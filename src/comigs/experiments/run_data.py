"""A run as data: a row for each of its clients, for each round of a client, and for each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from comigs.config import SPLITS, Config
from comigs.errors import UserError
from comigs.experiments.csv_file import Row
from comigs.runs.metrics import ClientSummary
from comigs.runs.report.read import Run, read_run
from comigs.runs.report.timeline import worked_tokens
from comigs.runs.tasks import Settings

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
TASK: dict[str, type] = {
    **dict.fromkeys(("client", "task", "measure", "by"), str),
    **dict.fromkeys(("round", "items"), int),
    **dict.fromkeys(("base", "base_error", "personal", "personal_error"), float),
    "difference_error": float,
    "lower_is_better": int,
    "settings": str,
}
TASK_LATER = ("difference_error", "lower_is_better", "settings")  # files from before have none


@dataclass(frozen=True)
class RunData:
    """What comparisons and sweeps know of a run.

    clients: a row for each client of a finished run, with the columns CLIENT. rounds: a row for
    each client and round, with the columns ROUND; a row without a client is the server's, and round
    0 measures the untouched base. tasks: a row for each client and measure of a task, with the
    columns TASK; errors are the means' standard errors over items.
    """

    folder: Path
    config: Config
    environment: Mapping[str, Any]
    finished: bool
    last_round: int
    clients: tuple[Row, ...]
    rounds: tuple[Row, ...]
    tasks: tuple[Row, ...] = ()


def read_run_folder(folder: Path) -> RunData:
    """Return a run from its folder. Raises UserError where the folder cannot be read."""
    run = read_run(folder)
    rows = tuple(_client(run, *each) for each in run.summary.clients.items()) if run.summary else ()
    if run.summary is not None:
        require_clients(folder / "summary.json", [row["client"] for row in rows], run.config)
    return RunData(
        folder=folder,
        config=run.config,
        environment=run.environment,
        finished=run.summary is not None,
        last_round=run.last_round,
        clients=rows,
        rounds=_rounds(run),
        tasks=_tasks(run),
    )


def require_clients(path: Path, names: Sequence[str], config: Config) -> None:
    """Raise UserError where a result is of other clients than the run's config has."""
    known = sorted(config.names)
    if sorted(names) != known:
        found = ", ".join(names) or "none"
        raise UserError(f"{path}: clients: {found}; the run's config has {', '.join(known)}")


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
        "trained_tokens": sum(line.local_tokens for line in trained),
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
    for end in run.ends:
        at(end.round, None)["drift"] = end.drift
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


def _tasks(run: Run) -> tuple[Row, ...]:
    """Return the rows of what a run's models, and the base, got right."""
    rows: list[Row] = []
    for client, results in run.tasks.clients.items():
        for task, result in results.items():
            for name, measure in result.measures.items():
                row: Row = {"client": client, "task": task, "measure": name, "by": result.by}
                row |= {"round": result.round, "items": measure.items}
                for of in ("base", "personal"):
                    estimate = getattr(measure, of)
                    row |= {of: estimate.mean, f"{of}_error": estimate.error}
                row["difference_error"] = measure.difference_error
                row["lower_is_better"] = int(measure.lower_is_better)
                row["settings"] = _in_words(result.settings)
                rows.append(row)
    return tuple(rows)


def _in_words(settings: Settings) -> str:
    """Return how a task was asked; what was not set is left out."""
    given = sorted((name, value) for name, value in settings.items() if value is not None)
    return ", ".join(f"{name} = {value}" for name, value in given)
