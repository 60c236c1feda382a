"""What a run writes down, line by line, and the only place that knows the fields of a line.

A line of metrics.jsonl or timings.jsonl, and the whole of summary.json (docs/run-folder.md), is a
record of this module: code makes records and reads their attributes. The same records are what a
run shows while it goes on. Fields are written in the order in which they stand here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, field_serializer, field_validator

from comigs.config import Split
from comigs.runs.record import (
    Count,
    Figure,
    OrLeftOut,
    Part,
    Perplexity,
    Record,
    SumOfWeights,
    Weight,
    Weights,
)


class Line(Record):
    """A line of metrics.jsonl says its kind and its round; round 0 is before any training."""

    kind: str
    round: int


class ClientLine(Line):
    """A line about one client names that client."""

    client: str


class TrainReport(ClientLine):
    """A client reports what its training in one round was like.

    A share by layer is a mean of routing weights per block, None without a router. adopted_share is
    None where no download was weighed. A loss is None where nothing of the kind was trained; that
    of what is sent, and its tokens, are told where it learns by itself. epsilon: of the run so far.
    """

    kind: Literal["train"] = "train"
    local_steps: Count
    router_steps: Count
    learning_rate: Figure
    train_nats_per_token: Figure | None = None
    train_nats_per_token_by_step: list[Figure]
    router_nats_per_token: Figure | None = None
    balance_loss: Figure | None = None
    trained_tokens: Count
    trained_parameters: Count
    generalist_share_by_layer: list[SumOfWeights] | None = None
    expert_share_by_layer: list[Weights] | None = None
    adopted_share: Weight | None = None
    sent_nats_per_token: Annotated[Figure | None, OrLeftOut] = None
    sent_tokens: Annotated[Count | None, OrLeftOut] = None
    epsilon: Annotated[Figure | None, OrLeftOut] = None

    @property
    def router_tokens(self) -> int:
        """The tokens the router learnt from; batches of both levels are of one size."""
        return self.router_steps * self.trained_tokens // max(1, self.local_steps)

    @property
    def local_tokens(self) -> int:
        """The tokens of local steps, those of what is sent and learns by itself as well."""
        return self.trained_tokens + (self.sent_tokens or 0)


class Amount(Record):
    """A number of tensors, and the bytes of their numbers."""

    slots: int = 0
    bytes: int = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(slots=self.slots + other.slots, bytes=self.bytes + other.bytes)


class Traffic(Record):
    """A client received and sent these bytes in one round; what it sent is told by role as well."""

    uploaded_bytes: int
    downloaded_bytes: int
    uploaded_by_role: dict[str, Amount] | None = None


class Train(Traffic, TrainReport):
    """A client's round of training as a run keeps it: its own report, and what travelled."""


class Score(Record):
    """A model does so well on a text; a figure is None where it was not measured.

    `tokens` is None in a mean over clients, and `perplexity_of_mean` everywhere else.
    """

    nats_per_token: Figure | None = None
    perplexity: Perplexity | None = None
    bits_per_byte: Figure | None = None
    tokens: Annotated[Count | None, OrLeftOut] = None
    perplexity_of_mean: Annotated[Perplexity | None, OrLeftOut] = None


class Measured(ClientLine):
    """A model was measured on one split of a client's text, after the round of the line.

    The model is the client's own (personal) or the untouched base, which is measured as of round 0.
    kept_part: which part of its model alone that is, where a client ended with one.
    """

    split: Split
    model: Literal["base", "personal"]
    nats_per_token: Figure | None = None
    perplexity: Perplexity | None = None
    bits_per_byte: Figure | None = None
    tokens: Count | None = None
    bytes: Count | None = None
    generalist_share_by_layer: list[SumOfWeights] | None = None
    expert_share_by_layer: list[Weights] | None = None
    adopted_share: Weight | None = None
    kept_part: Annotated[Part | None, OrLeftOut] = None

    @property
    def score(self) -> Score:
        """The figures alone, as a summary has them."""
        return Score(
            nats_per_token=self.nats_per_token,
            perplexity=self.perplexity,
            bits_per_byte=self.bits_per_byte,
            tokens=self.tokens,
        )


class Evaluation(Measured):
    """A model was measured while the run went on, or when it ended with the last round."""

    kind: Literal["evaluation"] = "evaluation"


class Kept(Measured):
    """The personal model of a client is that of the line's round, and comes to this on test."""

    kind: Literal["kept"] = "kept"


class LastDownload(ClientLine):
    """A client received these bytes in the exchange after the last round."""

    kind: Literal["download"] = "download"
    downloaded_bytes: int


class RoundEnd(Line):
    """A round ends. `asked`: None where all were. epsilon: of means that are private by client.

    drift: how far the uploads lie apart (server/diagnostics.py), None where nothing is shared.
    prior: client -> similar clients' mean routing weights, which it is told next; None: nobody's.
    """

    kind: Literal["server"] = "server"
    drift: float | None = None
    asked: Annotated[list[str] | None, OrLeftOut] = None
    prior: Annotated[dict[str, list[Weights]] | None, OrLeftOut] = None
    epsilon: Annotated[Figure | None, OrLeftOut] = None


class Absent(ClientLine):
    """A client was asked in that round, and nothing usable came, for this reason.

    The exchange after the last round counts as one round more.
    """

    kind: Literal["absent"] = "absent"
    reason: str


class Warned(Line):
    """A run shows a sign of going wrong; `client` is None where the sign is the server's."""

    kind: Literal["warning"] = "warning"
    client: str | None = None
    sign: str
    message: str


class Step(ClientLine):
    """A client has done one step. A step is shown and not kept; `step` counts local steps."""

    kind: Literal["step"] = "step"
    step: int
    level: Literal["experts", "router"]
    nats_per_token: float


class Note(Record):
    """A note says what is going on. It is shown and not kept; `say`: it is worth a line."""

    kind: Literal["note"] = "note"
    message: str
    say: Annotated[bool, Field(exclude_if=lambda said: not said)] = False


class Problem(Record):
    """A run on a server stops at this problem, which whoever watches the run is told."""

    kind: Literal["error"] = "error"
    message: str


class Timing(Record):
    """Seconds, speed and memory of one client's round: a line of timings.jsonl.

    Timings hold whatever differs between two equal runs. received_bytes and sent_bytes are of whole
    messages, in a federation.
    """

    round: int
    client: str | None = None
    tokens_per_second: Figure | None = None
    seconds: Figure | None = None
    peak_memory_bytes: Count | None = None
    received_bytes: Annotated[Count | None, OrLeftOut] = None
    sent_bytes: Annotated[Count | None, OrLeftOut] = None


class ClientSummary(Record):
    """One client's result; bytes are of the whole run. A client that was gone has empty scores.

    kept_round: the round whose model is the personal one, where that is the best round's.
    last_test: what the last round's came to, where that is another one. kept_part: which part of
    its model alone the personal one is, where it is one. adopted_share: how much of its download is
    in it, where the method asks.
    """

    test: Score
    base_test: Score
    kept_round: Annotated[Count | None, OrLeftOut] = None
    kept_part: Annotated[Part | None, OrLeftOut] = None
    adopted_share: Annotated[Weight | None, OrLeftOut] = None
    last_test: Annotated[Score | None, OrLeftOut] = None
    uploaded_bytes: int
    downloaded_bytes: int
    trained_parameters: int
    generalists: int
    specialists: int
    rank: int
    specialist_rank: int

    @field_validator("test", "base_test", mode="before")
    @classmethod
    def _empty(cls, score: Any) -> Any:
        return Score() if score is None else score

    @field_serializer("test", "base_test")
    def _null(self, score: Score) -> dict[str, Any] | None:
        return None if score == Score() else score.as_json()


class MeanSummary(Record):
    """The means over the clients that have both scores, `clients` of them; each counts once.

    last_test: of the last round's models, where any client's personal model is another one.
    """

    clients: int | None = None
    test: Score
    base_test: Score
    last_test: Annotated[Score | None, OrLeftOut] = None


class Summary(Record):
    """The result of a finished run: summary.json. weights: each client's in the merge, in words."""

    method: str
    weights: str | None = None
    base: str
    seed: int
    rounds: int
    clients: dict[str, ClientSummary]
    mean: MeanSummary


Event = Line | Note | Problem  # whatever a run tells whoever listens
ClientReport = TrainReport | Evaluation | Kept  # a line that a client writes
Told = Annotated[ClientReport, Field(discriminator="kind")]
REPORTED: TypeAdapter[list[ClientReport]] = TypeAdapter(list[Told])
