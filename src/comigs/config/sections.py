"""This module holds the sections of a config that say what a client is and how it trains.

The descriptions of all fields are the user's manual (docs/config.md).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
RouterData = Literal["valid", "train", "crossfit", "prior", "entropy"]


class Section(BaseModel):
    """A section is a part of the config: immutable, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataSection(Section):
    """[data] says how text becomes windows of tokens."""

    root: Path = Field(
        Path("."),
        description="Relative paths in `text` start from this folder, which itself starts from the "
        "config file's. Every path may begin with `~`.",
    )
    cache: Path = Field(
        Path(".cache/comigs"),
        description="Tokens are stored in this folder, which starts from the config file's. "
        "Default: .cache/comigs in the working folder.",
    )
    sequence_length: int = Field(
        128,
        ge=2,
        description="A window has this many tokens. It holds whole chats; a longer one is cut at "
        "its end.",
    )
    loss: Literal["answers", "all"] = Field(
        "answers",
        description='"answers": of a chat, the assistant\'s tokens are learnt and measured. "all": '
        "every token but the first is. Plain text has no answers, and every token of it is learnt "
        "and measured with either.",
    )
    distribution: Literal["in", "out"] = Field(
        "in",
        description='"in": a client\'s valid and test come from its own text. "out": they are the '
        "mixture of all clients' valid and test.",
    )
    valid_fraction: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="Where a hash splits the text, this share of documents is valid.",
    )
    test_fraction: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="Where a hash splits the text, this share of documents is test.",
    )
    short_repeat: int = Field(
        60,
        ge=0,
        description="A text of up to this many bytes that is in two splits or at two clients is "
        "everyday speech and stays where it comes first; a longer one is a leak and is refused. "
        "0: every such text is a leak.",
    )
    train_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="This share of each client's train text is used, from its start, in bytes.",
    )
    valid_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="This share of each client's valid text is used, from its start, in bytes.",
    )


class ExpertsSection(Section):
    """[experts] says what every client trains; entries of `clients` may differ."""

    generalists: int = Field(
        1,
        ge=0,
        description="A client has this many experts that the server averages. Methods with one "
        "expert give it the ranks of generalists and specialists together.",
    )
    specialists: int = Field(
        1,
        ge=0,
        description="A client has this many experts that never leave it. With comigs' "
        'options.specialists = "on-top" each is one expert with the generalists below it, beside '
        "everybody's generalists.",
    )
    rank: int = Field(12, ge=1, description="Generalists have this LoRA rank.")
    specialist_rank: int = Field(4, ge=1, description="Specialists have this LoRA rank.")
    attention_rank: int = Field(8, ge=1, description="LoRA on the attention linears has this rank.")
    share_attention: bool = Field(
        True,
        description="The server averages attention LoRA. false: it stays with its client (the "
        "all-specialist setting).",
    )
    alpha: float = Field(16.0, gt=0, description="Every LoRA is scaled with this alpha.")
    scaling: Literal["rslora", "lora"] = Field(
        "rslora",
        description='A LoRA adds its product times alpha / sqrt(rank) ("rslora") or alpha / rank '
        '("lora").',
    )
    strength: Literal["together", "each"] = Field(
        "together",
        description='"each": every expert has that scale, as in the paper. "together": the scale '
        "is corrected so that experts that share a token's weight act like one LoRA of all their "
        'ranks under scaling "rslora". Without effect where specialists are on top.',
    )
    top_k: int = Field(
        2,
        ge=1,
        description="A token uses this many experts. A client with one expert has no router and no "
        "choice.",
    )
    routing: Literal["token", "sequence", "client"] = Field(
        "token",
        description='The experts are weighed by each "token"; by the mean of the "sequence" up to '
        'the token; or by one free weight per expert and block for the whole "client".',
    )
    router_start: float = Field(
        0.02,
        ge=0,
        description="The router's starting weights have this standard deviation. 0 mixes exactly "
        "uniformly.",
    )

    def scale(self, rank: int) -> float:
        """Return the factor before B @ A for a LoRA of this rank.

        It is alpha / sqrt(rank) ("rslora", 2312.03732) or alpha / rank ("lora", 2106.09685).
        """
        return self.alpha / (math.sqrt(rank) if self.scaling == "rslora" else rank)


class ClientSection(Section):
    """[client] says how every client trains in a round; the defaults are the paper's."""

    steps: int = Field(10, ge=1, description="A client takes this many local steps in a round.")
    batch_size: int = Field(64, ge=1, description="A step learns from this many windows.")
    micro_batch_size: int | None = Field(
        None, ge=1, description="This many windows are in memory at once. None: batch_size."
    )
    lr: float | None = Field(
        None,
        gt=0,
        description="The experts' learning rate has this peak and falls with a cosine to a tenth. "
        "None: 2e-3 for GPT-2, 2e-4 for Llama-like bases.",
    )
    router_lr: float | None = Field(
        None, gt=0, description="The router's learning rate is constant. None: lr."
    )
    weight_decay: float = Field(
        0.01, ge=0, description="AdamW decays everything trained by this much."
    )
    betas: tuple[float, float] = Field(
        (0.9, 0.95), description="AdamW's two moments decay at these rates."
    )
    router_every: int = Field(
        30,
        ge=1,
        description="A router phase follows each time after this many local steps of a client, "
        "counted over all its rounds (tau).",
    )
    router_steps: int = Field(
        10,
        ge=0,
        description="A router phase has this many steps, each on a batch of router_data.",
    )
    router_data: RouterData = Field(
        "valid",
        description='The router learns from "valid", or, for clients without validation text, from '
        '"train"; by "crossfit" from a fold of train that the experts did not see since the last '
        "router phase; from train, its mean weights held to those of similar clients that have "
        'valid ("prior"); or from train without its targets, by being sure ("entropy").',
    )
    prior_coef: float = Field(
        1.0,
        ge=0,
        description='With router_data "prior", the distance from the prior has this weight, in '
        "nats beside the loss on train.",
    )
    folds: int = Field(
        4,
        ge=2,
        description="crossfit cuts train into this many parts; each phase leaves out the next one.",
    )
    balance_coef: float = Field(0.01, ge=0, description="The balance loss has this weight.")
    generalist_share: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="The balance loss gives the first expert this share of the load: a generalist, "
        "or the first own expert where specialists are on top. 0: an equal share.",
    )

    @field_validator("betas")
    @classmethod
    def _betas_in_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= b < 1 for b in value):
            raise ValueError("both must be in [0, 1)")
        return value
