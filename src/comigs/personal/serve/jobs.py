"""What is asked of the scheduler, and what comes back. Nothing here knows HTTP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a client's model is written with these records, too
    from comigs.personal.serve.packed import PackedClient


@dataclass(frozen=True)
class Settings:
    """How a text is written.

    max_tokens: tokens of one answer at most. temperature: 0 takes the likeliest token each time.
    top_p: only the likeliest tokens that together have this probability are drawn from. seed: the
    same request gets the same text; None: another each time. stop: an answer ends before the first
    of these texts. logprobs: so many alternatives of each token are told with its log probability;
    None: none are told.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True)
class TokenInfo:
    """One token of an answer: its log probability in nats, the likeliest tokens at its place with
    theirs, and where its text begins in the answer, in characters.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    offset: int


@dataclass(frozen=True)
class Piece:
    """What is new in one choice of an answer.

    num_tokens: of the choice so far. finish: "stop" or "length" in the last piece, None before.
    """

    choice: int
    text: str
    tokens: tuple[TokenInfo, ...]
    num_tokens: int
    finish: str | None


@dataclass(frozen=True)
class Failure:
    """An answer ends without its end: an HTTP status, a code of OpenAI's kind, and what is to be
    said.
    """

    status: int
    code: str
    message: str


Event = Piece | Failure


@dataclass(eq=False)
class Job:
    """One prompt and the choices that are to be written after it.

    choices: their numbers in the answer. deadline: seconds of `time.monotonic`. deliver: is called
    by the scheduler's thread with each event, and must not block. cancelled: nobody waits for the
    rest; set it from any thread.
    """

    client: PackedClient
    prompt: list[int] = field(repr=False)
    settings: Settings
    choices: range
    deadline: float
    deliver: Callable[[Event], None]
    cancelled: bool = False


class Refused(Exception):
    """A job is not taken: `failure` says why."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


BUSY = Failure(429, "queue_full", "too many requests are waiting; try again later")
STOPPING = Failure(503, "shutting_down", "the server is shutting down")
LATE = Failure(504, "timeout", "the request took longer than this server allows")
BROKEN = Failure(500, "internal_error", "the model failed on this request")
