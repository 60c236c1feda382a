"""The lines of metrics.jsonl and timings.jsonl that a client writes, checked as what comes from
another's machine.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from comigs.config import Split

Figure = Annotated[float, Field(ge=-1e100, le=1e100)]  # of any model, but their sums and means stay finite
Count = Annotated[int, Field(ge=0, le=10**15)]
Weight = Annotated[float, Field(ge=-0.01, le=1.01)]  # a mean of routing weights, with what rounding makes of it
Perplexity = Annotated[float, Field(ge=0, le=1.1e304)]  # exp(700), the most that is ever said


class Line(BaseModel):
    """Exactly these fields, of exactly these types, finite and no larger than anybody needs."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    round: int
    client: str


class Shares(Line):
    """Mean routing weights per block, None without a router; adopted_share: None where no download
    was weighed.
    """

    generalist_share_by_layer: list[Weight] | None
    expert_share_by_layer: list[Annotated[list[Weight], Field(min_length=1)]] | None
    adopted_share: Weight | None


class Train(Shares):
    """What a client's round of training was like."""

    kind: Literal["train"]
    local_steps: Count
    router_steps: Count
    learning_rate: Figure
    train_nats_per_token: Figure | None
    train_nats_per_token_by_step: list[Figure]
    router_nats_per_token: Figure | None
    balance_loss: Figure | None
    trained_tokens: Count
    trained_parameters: Count


class Evaluation(Shares):
    """A model on a split of the client's text."""

    kind: Literal["evaluation"]
    split: Split
    model: Literal["base", "personal"]
    nats_per_token: Figure
    perplexity: Perplexity
    bits_per_byte: Figure
    tokens: Count
    bytes: Count


class Timing(Line):
    """What differs between two equal runs."""

    tokens_per_second: Figure | None
    seconds: Figure
    peak_memory_bytes: Count
    received_bytes: Count | None = None  # whole messages, in a federation
    sent_bytes: Count | None = None


METRICS: TypeAdapter[list[Train | Evaluation]] = TypeAdapter(
    list[Annotated[Train | Evaluation, Field(discriminator="kind")]]
)
