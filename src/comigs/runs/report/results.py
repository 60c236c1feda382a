"""What came out of a run, as numbers.

A finished run is told by its summary, an unfinished one by its last evaluation on valid.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from comigs.config import ClientEntry, Text
from comigs.runs.metrics import Score
from comigs.runs.report.read import Run
from comigs.runs.simulated import wasted_bytes

SHAPE = ("generalists", "specialists", "rank", "specialist_rank")


@dataclass(frozen=True)
class ClientResult:
    """One client's result. A figure is None wherever the run has not measured it."""

    name: str
    text: str
    base: Score
    personal: Score
    trained_tokens: int
    generalists: int | None
    specialists: int | None
    rank: int | None
    specialist_rank: int | None
    trained_parameters: int | None
    uploaded_bytes: int
    downloaded_bytes: int

    @property
    def gain(self) -> float | None:
        """By which fraction the personal model is better than the base: see `gain`."""
        return gain(self.base, self.personal)

    @property
    def tokens(self) -> int | None:
        """How many tokens the shown figures were measured on."""
        return self.base.tokens if self.personal.tokens is None else self.personal.tokens


@dataclass(frozen=True)
class Results:
    """All clients and the mean of those that were measured, on `split`.

    rounds: how many are done. asked: clients in a round.
    """

    split: str
    rounds: int
    asked: int
    clients: tuple[ClientResult, ...]
    base: Score
    personal: Score

    @property
    def gain(self) -> float | None:
        """The gain of the mean perplexity, not the mean of the gains."""
        return gain(self.base, self.personal)

    @property
    def uploaded_per_client_and_round(self) -> float:
        """The bytes of a client that is asked in a round; 0 before the first round."""
        return sum(c.uploaded_bytes for c in self.clients) / max(1, self.rounds * self.asked)

    @property
    def measured(self) -> int:
        """The number of clients that the mean is over."""
        return sum(c.gain is not None for c in self.clients)


def gain(base: Score, personal: Score) -> float | None:
    """Return by which fraction a personal perplexity is below the base's: 1 - personal / base.

    It is None where either was not measured.
    """
    if not base.perplexity or personal.perplexity is None:
        return None
    return 1 - personal.perplexity / base.perplexity


def results(run: Run) -> Results:
    """Return the result of every client, in the config's order, and their mean."""
    clients = tuple(_client(run, name) for name in run.clients)
    asked = run.config.asked
    if run.summary is not None:
        summary, mean_of = run.summary, run.summary.mean
        return Results("test", summary.rounds, asked, clients, mean_of.base_test, mean_of.test)

    # Means over different clients would compare nothing, so both are of those that have both.
    both = [client for client in clients if client.gain is not None] or clients
    base, personal = mean_score([c.base for c in both]), mean_score([c.personal for c in both])
    return Results("valid", run.last_round, asked, clients, base, personal)


def _client(run: Run, name: str) -> ClientResult:
    # Until there is a summary, config and lines say what it will say.
    text, has = "", None
    for entry in run.config.clients:
        if entry.name == name:
            text, has = describe_text(entry), run.config.shape_of(entry)
    lines = [line for line in run.train if line.client == name]
    summary = run.summary.clients.get(name) if run.summary else None
    attempts = [attempt for attempt in run.attempts if attempt.client == name]
    wasted = wasted_bytes(attempts, [line.round for line in lines])
    amounts: dict[str, Any] = {
        "trained_parameters": lines[-1].trained_parameters if lines else None,
        "uploaded_bytes": wasted[0] + sum(line.uploaded_bytes for line in lines),
        "downloaded_bytes": wasted[1] + sum(line.downloaded_bytes for line in lines),
    }
    shape: dict[str, Any] = {field: getattr(has, field, None) for field in SHAPE}
    if summary is not None:
        shape = {field: getattr(summary, field) for field in SHAPE}
        base, personal = summary.base_test, summary.test
        amounts = {field: getattr(summary, field) for field in amounts}
    else:
        split = "test" if run.summary else "valid"
        base, personal = (_latest(run, name, split, model) for model in ("base", "personal"))
    return ClientResult(
        name=name,
        text=text,
        base=base,
        personal=personal,
        trained_tokens=sum(line.local_tokens for line in lines),
        **shape,
        **amounts,
    )


def describe_text(entry: ClientEntry) -> str:
    """Return a client's text as its config names it; where splits are given, the file of train."""
    if isinstance(entry.text, Text):
        return f"{entry.text.train.rpartition('/')[2]} (splits given)"
    return entry.text or "on the client's device"


def _latest(run: Run, name: str, split: str, model: str) -> Score:
    found = [
        line
        for line in run.evaluations
        if line.client == name and line.split == split and line.model == model
    ]
    return max(found, key=lambda line: line.round).score if found else Score()


def mean_score(scores: list[Score]) -> Score:
    """Return the mean of each figure of several scores, over those that have it."""
    return Score(
        nats_per_token=mean(score.nats_per_token for score in scores),
        perplexity=mean(score.perplexity for score in scores),
        bits_per_byte=mean(score.bits_per_byte for score in scores),
    )


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of what was measured; it is None where nothing was."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
