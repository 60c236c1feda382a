"""What server and engines say to each other: tasks and downloads one way, replies the other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from comigs.config import Split
from comigs.methods.method import Download, Upload
from comigs.runs.metrics import Event, Line
from comigs.slots import Shapes

Report = Callable[[Event], None]
Prior = tuple[tuple[float, ...], ...]  # by block and expert; each block's weights sum to 1


@dataclass(frozen=True)
class Task:
    """The server asks this of a client in one exchange: receive, evaluate, train, send.

    round: the round to train (from 1). train: False in the last exchange, which only delivers and
    evaluates. evaluate: splits to measure with the client's own model, as it is after the download
    of round - 1. evaluate_base: splits to measure with the base alone. prior: mean routing weights
    of similar clients, by block and expert, for a client that asks for them.
    """

    round: int
    train: bool
    evaluate: tuple[Split, ...]
    evaluate_base: tuple[Split, ...]
    prior: Prior | None = None


@dataclass(frozen=True)
class Reply:
    """A client sends this back.

    upload: None where it did not train. metrics, timing: its lines of metrics.jsonl and its line of
    timings.jsonl, as records or as their JSON; nobody has checked them yet (server/validation.py).
    train_tokens: in its train split; 1 where no client's own claim counts. round: of the task that
    the reply answers.
    """

    upload: Upload | None
    metrics: Sequence[Any]
    timing: Any = None
    train_tokens: int = 0
    round: int = 0


@dataclass(frozen=True)
class Answers:
    """One exchange brings these answers. Every client that was asked is in replies or in absent.

    replies: in time, by client, in the order of the tasks. absent: client -> why nothing usable
    came, in a few words. late: replies to what was asked in an earlier exchange (reply.round) that
    came in since. lines: what the engine itself says of the exchange, to be kept. pending: of the
    absent, those whose reply may still come; None where nobody knows. blameless: of the absent,
    those that did all they could, and whose answer does not count for want of others.
    """

    replies: dict[str, Reply]
    absent: dict[str, str] = field(default_factory=dict)
    late: dict[str, Reply] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    pending: Collection[str] | None = None
    blameless: Collection[str] = ()


class Engine(Protocol):
    """An engine carries one exchange to the clients that are asked, and back."""

    @property
    def shapes(self) -> Mapping[str, Shapes]:
        """The shape of every tensor that a client has, by client: what uploads are held against."""

    def exchange(self, tasks: Mapping[str, Task], downloads: Mapping[str, Download]) -> Answers:
        """Send each client its task and download, and wait for the replies.

        Clients without an entry in `downloads` receive nothing. Uploads can be read until the next
        commit of the run folder. A round that is not complete is asked again, of those only whose
        upload is missing.
        """

    def probe(self, uploads: Mapping[str, Upload], round: int) -> dict[str, dict[str, float]]:
        """Let every client of `uploads` measure all of them on a sample of its valid text.

        Returns reader -> author -> nats per token.
        """
