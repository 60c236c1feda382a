"""The parts of a config, and every field they have, in its unit."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")


class Section(BaseModel):
    """A part of the tree: immutable, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class BaseSection(Section):
    """[base]: the frozen language model all clients share."""

    name: str = Field(
        "mini",
        description="mini, smollm2-135m, tiny-gpt2, tiny-llama, a local folder (models/mine) or hub name",
    )
    dtype: Literal["auto", "float64", "float32", "bfloat16"] = Field(
        "auto",
        description="of the frozen weights and of autocast; auto: bfloat16 where the device is fast at it",
    )
    attention: Literal["auto", "eager", "sdpa"] = Field(
        "auto",
        description="transformers' attention; auto: eager on a CPU, a quarter faster at 128 tokens, sdpa on a GPU",
    )
    device: str = Field(
        "auto", description='"cpu", "cuda", "cuda:1", ...; auto: cuda where there is one'
    )
    threads: int | None = Field(
        None,
        gt=0,
        le=1024,
        description="CPU threads; None: as torch finds them (recorded; a resumed run uses the same)",
    )


class DataSection(Section):
    """[data]: how text becomes windows of tokens."""

    root: Path = Field(
        Path("."),
        description="folder that relative paths in `text` start from; default: the config file's",
    )
    cache: Path = Field(
        Path(".cache/comigs"),
        description="folder of the token stores, relative to the working folder",
    )
    sequence_length: int = Field(128, ge=2, description="tokens per window")
    distribution: Literal["in", "out"] = Field(
        "in",
        description='"in": valid and test from the client\'s own text; "out": mixture of all clients\' valid and test',
    )
    valid_fraction: float = Field(
        0.1, gt=0, lt=1, description="share of documents in valid where splits are made by hash"
    )
    test_fraction: float = Field(
        0.1, gt=0, lt=1, description="share of documents in test where splits are made by hash"
    )
    train_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of each client's train text that is used, from its start, in bytes",
    )
    valid_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of each client's valid text that is used, from its start, in bytes",
    )


class ExpertsSection(Section):
    """[experts]: what every client trains. `clients` entries may differ."""

    generalists: int | None = Field(
        None, ge=0, description="experts averaged by the server; None: 1, but see specialists"
    )
    specialists: int | None = Field(
        None,
        ge=0,
        description="experts that never leave their client; None: 1, but where no number of experts is given at all, "
        "comigs has a single one of all ranks, which is averaged, beside the rest of the world",
    )
    rank: int = Field(8, ge=1, description="LoRA rank of every expert")
    specialist_rank: int | None = Field(
        None, ge=1, description="LoRA rank of the specialists; None: rank"
    )
    attention_rank: int | None = Field(
        None, ge=1, description="LoRA rank on the attention linears; None: rank"
    )
    share_attention: bool = Field(
        True, description="false: attention LoRA stays home (the all-specialist setting)"
    )
    alpha: float = Field(16.0, gt=0, description="LoRA alpha")
    scaling: Literal["rslora", "lora"] = Field(
        "rslora", description="alpha / sqrt(rank) or alpha / rank"
    )
    strength: Literal["together", "each"] = Field(
        "together",
        description='"each": every expert has that scale, as in the paper; "together": it is corrected so that experts '
        "that share a token's weight act like one LoRA of all their ranks",
    )
    top_k: int = Field(
        2,
        ge=1,
        description="experts used per token; a client with one expert has no router and no choice",
    )
    routing: Literal["token", "sequence", "client"] = Field(
        "token",
        description='what weighs the experts: each "token"; the mean of the "sequence" up to the token; '
        'or one free weight per expert and block for the whole "client"',
    )
    router_start: float = Field(
        0.02,
        ge=0,
        description="standard deviation of the router's starting weights; 0: uniform mixing exactly",
    )

    def scale(self, rank: int) -> float:
        """The factor before B @ A: alpha / sqrt(rank) ("rslora", 2312.03732) or alpha / rank
        ("lora", 2106.09685).
        """
        return self.alpha / (math.sqrt(rank) if self.scaling == "rslora" else rank)


class ClientSection(Section):
    """[client]: how every client trains in a round (the defaults are the paper's)."""

    steps: int = Field(10, ge=1, description="local steps per round")
    batch_size: int = Field(64, ge=1, description="windows per step")
    micro_batch_size: int | None = Field(
        None, ge=1, description="windows at once in memory; None: batch_size"
    )
    lr: float | None = Field(
        None,
        gt=0,
        description="experts' peak rate, cosine to lr/10; None: 2e-3 GPT-2, 2e-4 Llama-like",
    )
    router_lr: float | None = Field(None, gt=0, description="router's constant rate; None: lr")
    weight_decay: float = Field(0.01, ge=0, description="AdamW, on everything trained")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's two decay rates")
    router_every: int = Field(
        30,
        ge=1,
        description="a client's local steps between router phases, counted over all its rounds (tau)",
    )
    router_steps: int = Field(
        10, ge=0, description="router steps in a phase, each on a batch of router_data"
    )
    router_data: Literal["valid", "train", "crossfit"] = Field(
        "valid",
        description='what the router learns from: "valid"; "train"; or "crossfit", a fold of train that the experts '
        "did not see since the last router phase (for clients without validation text)",
    )
    folds: int = Field(
        4, ge=2, description="parts of train in crossfit; each phase leaves out the next one"
    )
    balance_coef: float = Field(0.01, ge=0, description="weight of the balance loss")
    generalist_share: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="load that the balance loss gives the first generalist; 0: equal",
    )
    leaky_gradients: bool = Field(
        False,
        description="reproduce the authors' loop, in which one level's gradients leak into the other's next step",
    )

    @field_validator("betas")
    @classmethod
    def _betas_in_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= b < 1 for b in value):
            raise ValueError("both must be in [0, 1)")
        return value


class EvaluationSection(Section):
    """[evaluation]: what is measured during the run. Test is always measured after the last
    download.
    """

    every: int = Field(1, ge=0, description="rounds between evaluations during the run; 0: none")
    splits: tuple[Split, ...] = Field(("valid",), description="splits evaluated during the run")
    batch_size: int = Field(32, ge=1, description="windows at once")


class ParticipationSection(Section):
    """[participation]: who is asked in a round, how long it waits, and what becomes of who does not
    answer.
    """

    clients_per_round: int | None = Field(
        None,
        ge=1,
        description="clients asked in a round, drawn anew each round by the seed; None: all",
    )
    min_clients: int = Field(
        1,
        ge=1,
        description="usable uploads a round needs; with fewer, those that are missing are asked again",
    )
    deadline: float = Field(
        3600, gt=0, description="seconds a round waits for uploads (engine flower)"
    )
    late: Literal["drop", "discount"] = Field(
        "drop",
        description='what becomes of an upload that comes in after its round: "drop"; "discount": its step counts in '
        "the round in which it comes in, times late_discount",
    )
    late_discount: float = Field(0.5, gt=0, le=1, description="factor of a late upload's step")
    max_failures: int = Field(
        3,
        ge=1,
        description="times in a row that a client is asked and nothing usable comes, after which it is left out for "
        "the rest of the run",
    )


class UploadSection(Section):
    """[upload]: how uploads travel, which of them count, and how they become one."""

    format: Literal["float32", "bfloat16", "int8"] = Field(
        "float32",
        description="of the numbers that travel; downloads are bfloat16 where uploads are not float32",
    )
    merge: Literal["mean", "trimmed", "median"] = Field(
        "mean",
        description='how methods that average uploads do it, number by number: "mean"; "trimmed": the mean without '
        'the largest and smallest; "median"',
    )
    trim: float = Field(
        0.25,
        ge=0,
        lt=0.5,
        description="share of uploads cut at either end where merge is trimmed, rounded down",
    )
    max_norm: float | None = Field(
        None,
        gt=0,
        description="largest length of the step from the download to the upload (from the common start where a tensor "
        "was in no download); None: any",
    )
    max_norm_ratio: float = Field(
        10.0,
        gt=1,
        description="the same as a multiple of the median length of the round's uploads, where there are 3 or more; "
        "1e30: any",
    )


class Text(Section):
    """A client's text with its splits given, each as "source:argument" or a path."""

    train: str = Field(description="what the experts learn from")
    valid: str = Field(description="what the router learns from")
    test: str = Field(description="what the result is measured on, and nothing else")


class ClientEntry(Section):
    """[[clients]]: one client; what is None is taken from [experts]."""

    name: str = Field(
        description="letters, digits, '.', '_' and '-'; also the name of its folder in the run"
    )
    text: str | Text | None = Field(
        None,
        description='"source:argument" or a path, split by hash; or {train = ..., valid = ..., test = ...}; '
        "None: it is on the client's own device (engine flower)",
    )
    specialists: int | None = Field(
        None, ge=0, description="number of specialists; None: experts.specialists"
    )
    rank: int | None = Field(
        None, ge=1, description="LoRA rank of this client's experts; None: experts.rank"
    )
    specialist_rank: int | None = Field(
        None, ge=1, description="rank of its specialists; None: experts.specialist_rank, else rank"
    )
    weight: float | None = Field(
        None,
        gt=0,
        description="how much it counts where a method weighs clients by their text; None: its train tokens "
        "in-process, and 1 in a federation, where no client's own claim counts",
    )

    @field_validator("name")
    @classmethod
    def _name_is_a_file_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", value):
            raise ValueError(
                "1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit"
            )
        return value
