"""What server and engines say to each other: tasks and downloads one way, replies the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from comigs.config import Split
from comigs.methods.method import Download, Upload
from comigs.slots import Shapes

Event = Mapping[str, Any]  # a line of metrics.jsonl, or {"kind": "step", ...}, which is only shown
Report = Callable[[Event], None]


@dataclass(frozen=True)
class Task:
    """What the server asks of a client in one exchange, in this order: receive, evaluate, train,
    send.

    round: the round to train (from 1). train: False in the last exchange, which only delivers and
    evaluates.
    evaluate: splits to measure with the client's own model, as it is after the download of round -
    1.
    evaluate_base: splits to measure with the base alone.
    """

    round: int
    train: bool
    evaluate: tuple[Split, ...]
    evaluate_base: tuple[Split, ...]


@dataclass(frozen=True)
class Reply:
    """What a client sends back.

    upload: None where it did not train. metrics: lines of metrics.jsonl; timing: its line of
    timings.jsonl.
    train_tokens: in its train split; 1 where no client's own claim counts. round: of the task it
    answers.
    """

    upload: Upload | None
    metrics: list[dict[str, Any]]
    timing: dict[str, Any] = field(default_factory=dict)
    train_tokens: int = 0
    round: int = 0


@dataclass(frozen=True)
class Answers:
    """What came back of one exchange.

    replies: in time, by client, in the order of the tasks. absent: client -> why nothing usable
    came, in a few words.
    late: answers to what was asked in an earlier exchange (reply.round) and came in since.
    Every client that was asked is in replies or in absent.
    """

    replies: dict[str, Reply]
    absent: dict[str, str] = field(default_factory=dict)
    late: dict[str, Reply] = field(default_factory=dict)


class Engine(Protocol):
    """Carries one exchange to the clients that are asked, and back."""

    @property
    def shapes(self) -> Mapping[str, Shapes]:
        """Of every tensor that a client has, by client (check.shapes_of_clients); what uploads are
        held against.
        """

    def exchange(self, tasks: Mapping[str, Task], downloads: Mapping[str, Download]) -> Answers:
        """One message to each client in `tasks`, and what comes back. No download: there is none to
        receive.

        Uploads can be read until the next commit of the run folder. A round that is not complete is
        asked again, of those only whose upload is missing.
        """

    def probe(self, uploads: Mapping[str, Upload], round: int) -> dict[str, dict[str, float]]:
        """reader -> author -> nats per token of the author's upload on a sample of the reader's
        valid.

        Readers are the clients of `uploads`.
        """
