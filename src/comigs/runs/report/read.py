"""Read a run folder (docs/run-folder.md) into frozen records, refusing what is not as written
there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comigs.config import Config, load_config
from comigs.errors import UserError
from comigs.runs.report.fields import Fields


@dataclass(frozen=True)
class Score:
    """A model on a text; None: not measured. `tokens` is None in a mean, `perplexity_of_mean`
    everywhere else.
    """

    nats_per_token: float | None = None
    perplexity: float | None = None
    bits_per_byte: float | None = None
    tokens: int | None = None
    perplexity_of_mean: float | None = None


@dataclass(frozen=True)
class Train:
    """One client's training in one round. None: not measured, or nothing of the kind (no router, no
    steps).
    """

    round: int
    client: str
    nats_per_token: float | None
    nats_per_token_by_step: tuple[float | None, ...]
    generalist_share_by_layer: tuple[float | None, ...] | None
    expert_share_by_layer: tuple[tuple[float | None, ...], ...] | None
    adopted_share: float | None
    trained_tokens: int  # the experts'
    router_tokens: int  # what the router learnt from beside them
    trained_parameters: int | None
    uploaded_bytes: int
    downloaded_bytes: int
    uploaded_by_role: dict[str, dict[str, int]] | None  # role -> {"slots", "bytes"}


@dataclass(frozen=True)
class Evaluation:
    """One client's model on one split after a round; round 0 is before any training."""

    round: int
    client: str
    split: str
    model: str  # base | personal
    score: Score
    generalist_share_by_layer: tuple[float | None, ...] | None
    expert_share_by_layer: tuple[tuple[float | None, ...], ...] | None


@dataclass(frozen=True)
class Drift:
    """How far the clients' uploads of a round lie apart; None where nothing is shared."""

    round: int
    drift: float | None


@dataclass(frozen=True)
class Warned:
    """A failure sign the run has seen; `client` is None for the server."""

    round: int
    client: str | None
    sign: str
    message: str


@dataclass(frozen=True)
class Absent:
    """A client that was asked in a round (the exchange at the end is one more) and gave nothing
    usable.
    """

    round: int
    client: str
    reason: str


@dataclass(frozen=True)
class Timing:
    """Seconds, speed and memory of one client's round; `client` is None for the whole round."""

    round: int
    client: str | None
    seconds: float | None
    tokens_per_second: float | None
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class ClientSummary:
    """One client's result, with no scores where it was gone at the end; bytes are of the whole
    run.
    """

    test: Score
    base_test: Score
    uploaded_bytes: int
    downloaded_bytes: int
    trained_parameters: int | None
    generalists: int | None
    specialists: int | None
    rank: int | None
    specialist_rank: int | None


@dataclass(frozen=True)
class Summary:
    """The result of a finished run. `weights`: how much each client counts in the server's merge,
    in words.
    """

    method: str
    weights: str | None
    base: str
    seed: int
    rounds: int
    clients: dict[str, ClientSummary]
    test: Score
    base_test: Score


@dataclass(frozen=True)
class Run:
    """Everything in a run folder that a report needs. `summary` is None while the run is
    unfinished.
    """

    folder: Path
    config: Config
    config_text: str
    environment: dict[str, Any]
    train: tuple[Train, ...]
    evaluations: tuple[Evaluation, ...]
    drift: tuple[Drift, ...]
    warnings: tuple[Warned, ...]
    absent: tuple[Absent, ...]
    timings: tuple[Timing, ...]
    summary: Summary | None

    @property
    def clients(self) -> tuple[str, ...]:
        """Names as in the config, then whoever else appears in the metrics."""
        seen = [c.name for c in self.config.clients]
        seen += [t.client for t in self.train] + [e.client for e in self.evaluations]
        return tuple(dict.fromkeys(seen))

    @property
    def last_round(self) -> int:
        """The last round of which something was written; 0 before the first."""
        return max([t.round for t in self.train] + [e.round for e in self.evaluations], default=0)


def read_run(folder: str | Path) -> Run:
    """Read one run folder; works while the run is still going.

    Raises UserError with one line naming the file (and line) that is missing or not as
    docs/run-folder.md says.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder")
    config = load_config(folder / "config.toml")
    metrics = _lines(folder / "metrics.jsonl")
    kinds = ("train", "evaluation", "server", "warning", "absent")
    of = {kind: [m for m in metrics if m.text("kind") == kind] for kind in kinds}
    timings = _lines(folder / "timings.jsonl") if (folder / "timings.jsonl").exists() else []
    summary = folder / "summary.json"
    return Run(
        folder=folder,
        config=config,
        config_text=_text(folder / "config.toml"),
        environment=_object(folder / "env.json").values,
        train=tuple(map(_train, of["train"])),
        evaluations=tuple(map(_evaluation, of["evaluation"])),
        drift=tuple(Drift(f.integer("round"), f.number("drift")) for f in of["server"]),
        warnings=tuple(
            Warned(f.integer("round"), f.optional_text("client"), f.text("sign"), f.text("message"))
            for f in of["warning"]
        ),
        absent=tuple(Absent(f.integer("round"), f.text("client"), f.text("reason")) for f in of["absent"]),
        timings=tuple(map(_timing, timings)),
        summary=_summary(_object(summary)) if summary.exists() else None,
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: missing; is {path.parent} the folder of a run that has started?") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def _parse(text: str) -> Any:
    """JSON; NaN and infinities, which JSON does not have, count as not measured."""
    return json.loads(text, parse_constant=lambda _: None)


def _object(path: Path) -> Fields:
    try:
        return Fields(str(path), _parse(_text(path)))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}: not JSON: {error.msg}") from None


def _lines(path: Path) -> list[Fields]:
    """One record a line. A last line without its line end is being written right now: left out if
    torn.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        raise UserError(f"{path}: missing; nothing has been measured in this run yet") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            value = _parse(line.decode("utf-8"))
        except ValueError as error:
            if number == len(lines) and not line.endswith(b"\n"):
                break
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "not UTF-8"
            raise UserError(f"{path}: line {number}: not JSON: {reason}") from None
        records.append(Fields(f"{path}: line {number}", value))
    return records


def _train(f: Fields) -> Train:
    return Train(
        round=f.integer("round"),
        client=f.text("client"),
        nats_per_token=f.number("train_nats_per_token"),
        nats_per_token_by_step=f.numbers("train_nats_per_token_by_step") or (),
        generalist_share_by_layer=f.numbers("generalist_share_by_layer"),
        expert_share_by_layer=f.rows("expert_share_by_layer"),
        adopted_share=f.number("adopted_share"),
        trained_tokens=f.integer("trained_tokens"),
        router_tokens=_router_tokens(f),
        trained_parameters=f.optional_integer("trained_parameters"),
        uploaded_bytes=f.integer("uploaded_bytes"),
        downloaded_bytes=f.integer("downloaded_bytes"),
        uploaded_by_role=_by_role(f.section("uploaded_by_role")) if f.has("uploaded_by_role") else None,
    )


def _router_tokens(f: Fields) -> int:
    """Batches of both levels are of one size."""
    return f.integer("router_steps") * f.integer("trained_tokens") // max(1, f.integer("local_steps"))


def _by_role(f: Fields) -> dict[str, dict[str, int]]:
    return {role: {name: f.section(role).integer(name) for name in ("slots", "bytes")} for role in f.values}


def _evaluation(f: Fields) -> Evaluation:
    return Evaluation(
        round=f.integer("round"),
        client=f.text("client"),
        split=f.text("split"),
        model=f.text("model"),
        score=_score(f),
        generalist_share_by_layer=f.numbers("generalist_share_by_layer"),
        expert_share_by_layer=f.rows("expert_share_by_layer"),
    )


def _timing(f: Fields) -> Timing:
    seconds, speed, memory = f.number("seconds"), f.number("tokens_per_second"), f.optional_integer("peak_memory_bytes")
    return Timing(f.integer("round"), f.optional_text("client"), seconds, speed, memory)


def _score(f: Fields) -> Score:
    return Score(
        nats_per_token=f.number("nats_per_token"),
        perplexity=f.number("perplexity"),
        bits_per_byte=f.number("bits_per_byte"),
        tokens=f.optional_integer("tokens"),
        perplexity_of_mean=f.number("perplexity_of_mean"),
    )


def _summary(f: Fields) -> Summary:
    clients, mean = f.section("clients"), f.section("mean")
    return Summary(
        method=f.text("method"),
        weights=f.optional_text("weights"),
        base=f.text("base"),
        seed=f.integer("seed"),
        rounds=f.integer("rounds"),
        clients={name: _client_summary(clients.section(name)) for name in clients.values},
        test=_score(mean.section("test")),
        base_test=_score(mean.section("base_test")),
    )


def _client_summary(f: Fields) -> ClientSummary:
    return ClientSummary(
        test=_score(f.section("test")) if f.has("test") else Score(),
        base_test=_score(f.section("base_test")) if f.has("base_test") else Score(),
        uploaded_bytes=f.integer("uploaded_bytes"),
        downloaded_bytes=f.integer("downloaded_bytes"),
        trained_parameters=f.optional_integer("trained_parameters"),
        generalists=f.optional_integer("generalists"),
        specialists=f.optional_integer("specialists"),
        rank=f.optional_integer("rank"),
        specialist_rank=f.optional_integer("specialist_rank"),
    )
