"""What came out of a run, as numbers: finished runs by their summary, unfinished ones by the last
valid evaluation.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from comigs.config import ClientEntry, ExpertShape, Text
from comigs.runs.metrics import ClientSummary, Score
from comigs.runs.report.read import Run


@dataclass(frozen=True)
class ClientResult:
    """One client. None wherever the run has not measured it."""

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
        """See `gain`."""
        return gain(self.base, self.personal)

    @property
    def tokens(self) -> int | None:
        """How many tokens the shown figures were measured on."""
        return _first(self.personal.tokens, self.base.tokens)


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
        """Gain of the mean perplexity, not the mean of the gains."""
        return gain(self.base, self.personal)

    @property
    def uploaded_per_client_and_round(self) -> float:
        """Bytes, of the clients that are asked; 0 before the first round."""
        return sum(c.uploaded_bytes for c in self.clients) / max(1, self.rounds * self.asked)

    @property
    def measured(self) -> int:
        """Clients that the mean is over."""
        return sum(c.gain is not None for c in self.clients)


def gain(base: Score, personal: Score) -> float | None:
    """By which fraction the personal model's perplexity is lower than the base's: 1 - personal /
    base.
    """
    if not base.perplexity or personal.perplexity is None:
        return None
    return 1 - personal.perplexity / base.perplexity


def results(run: Run) -> Results:
    """The result of every client, in the config's order, and their mean."""
    clients = tuple(_client(run, name) for name in run.clients)
    asked = run.config.participation.clients_per_round or len(clients)
    if run.summary is not None:
        return Results(
            "test",
            run.summary.rounds,
            asked,
            clients,
            run.summary.mean.base_test,
            run.summary.mean.test,
        )
    both = [
        c for c in clients if c.gain is not None
    ] or clients  # means over different clients would compare nothing
    return Results(
        "valid",
        run.last_round,
        asked,
        clients,
        _mean([c.base for c in both]),
        _mean([c.personal for c in both]),
    )


def _client(run: Run, name: str) -> ClientResult:
    entry = next((c for c in run.config.clients if c.name == name), None)
    shape = run.config.shape_of(entry) if entry else None
    summary = run.summary.clients.get(name) if run.summary else None
    lines = [t for t in run.train if t.client == name]
    split = "test" if run.summary else "valid"
    has: ClientSummary | ExpertShape | None = summary or shape
    return ClientResult(
        name=name,
        text=describe_text(entry) if entry else "",
        base=summary.base_test if summary else _latest(run, name, split, "base"),
        personal=summary.test if summary else _latest(run, name, split, "personal"),
        trained_tokens=sum(t.trained_tokens for t in lines),
        generalists=has.generalists if has else None,
        specialists=has.specialists if has else None,
        rank=has.rank if has else None,
        specialist_rank=has.specialist_rank if has else None,
        trained_parameters=_first(
            *(x.trained_parameters for x in ([summary] if summary else lines[::-1]))
        ),
        uploaded_bytes=summary.uploaded_bytes if summary else sum(t.uploaded_bytes for t in lines),
        downloaded_bytes=summary.downloaded_bytes
        if summary
        else sum(t.downloaded_bytes for t in lines),
    )


def describe_text(entry: ClientEntry) -> str:
    """The client's text as its config names it; where splits are given, the file of train."""
    if isinstance(entry.text, Text):
        return f"{entry.text.train.rpartition('/')[2]} (splits given)"
    return entry.text or "on the client's device"


def _latest(run: Run, name: str, split: str, model: str) -> Score:
    found = [e for e in run.evaluations if (e.client, e.split, e.model) == (name, split, model)]
    return max(found, key=lambda e: e.round).score if found else Score()


def _mean(scores: list[Score]) -> Score:
    return Score(
        nats_per_token=mean(s.nats_per_token for s in scores),
        perplexity=mean(s.perplexity for s in scores),
        bits_per_byte=mean(s.bits_per_byte for s in scores),
    )


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of what was measured; None where nothing was."""
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _first(*values: int | None) -> int | None:
    return next((v for v in values if v is not None), None)
