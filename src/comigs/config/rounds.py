"""This module holds the sections of a config that say what happens around the clients' training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from comigs.config.sections import Section, Split


class EvaluationSection(Section):
    """[evaluation] says what is measured during the run.

    Test is always measured after the last download.
    """

    every: int = Field(
        1, ge=0, description="Clients' models are evaluated every so many rounds. 0: never."
    )
    splits: tuple[Split, ...] = Field(
        ("valid",), description="These splits are evaluated during the run."
    )
    keep: Literal["best", "last"] = Field(
        "best",
        description="A client's personal model is that of the round in which its valid was lowest "
        '("best"), or that of the "last" round. "best" needs every to be 1 or more, and valid '
        "among splits.",
    )
    batch_size: int = Field(
        32, ge=1, description="An evaluation has this many windows in memory at once."
    )


class ParticipationSection(Section):
    """[participation] says who is asked in a round, and what becomes of who does not answer."""

    clients_per_round: int | None = Field(
        None,
        ge=1,
        description="This many clients are asked in a round, drawn anew each round by the seed. "
        "None: all.",
    )
    min_clients: int = Field(
        1,
        ge=1,
        description="A round needs this many usable uploads; with fewer, the clients that are "
        "missing are asked again.",
    )
    deadline: float = Field(
        3600,
        gt=0,
        description="A round waits this many seconds for uploads: with engine flower, and "
        "simulated ones with [conditions].",
    )
    late: Literal["drop", "discount"] = Field(
        "drop",
        description='An upload that comes in after its round is dropped ("drop"), or its step '
        'counts in the round in which it comes in, times late_discount ("discount").',
    )
    late_discount: float = Field(
        0.5, gt=0, le=1, description="The step of a late upload is multiplied by this factor."
    )
    max_failures: int = Field(
        3,
        ge=1,
        description="A client that is asked this many times in a row and sends nothing usable is "
        "left out from then on. Of earlier rounds each counts once, however often it was asked.",
    )


class TrackSection(Section):
    """[track] says in which programs the curves of a run are shown, beside its report.

    Nothing private goes there unless it is asked for. See docs/track.md.
    """

    to: tuple[str, ...] = Field(
        (),
        description='Curves go to these trackers: "tensorboard", "mlflow", "wandb". Each needs its '
        "extra, as comigs[wandb].",
    )
    names: bool = Field(
        False,
        description="Trackers are told the names of the run and its clients. false: clients are "
        "client-1, client-2, ... in the order of the config.",
    )


class UploadSection(Section):
    """[upload] says how uploads travel, which of them count, and how they become one."""

    format: Literal["float32", "bfloat16", "int8"] = Field(
        "float32",
        description="The numbers of an upload travel in this format; downloads travel as bfloat16 "
        "unless it is float32.",
    )
    merge: Literal["mean", "trimmed", "median"] = Field(
        "mean",
        description='Methods that average uploads (comigs: with options.attention = "mean") take, '
        'number by number, the "mean"; the mean without the largest and smallest ("trimmed"); '
        'or the "median".',
    )
    trim: float = Field(
        0.25,
        ge=0,
        lt=0.5,
        description="A trimmed merge cuts this share of uploads at either end, rounded down.",
    )
    max_norm: float | None = Field(
        None,
        gt=0,
        description="The step from a download to its upload may have this length at most; the step "
        "starts from the common start where a tensor was in no download. None: any length.",
    )
    max_norm_ratio: float = Field(
        10.0,
        gt=1,
        description="The step may be at most this many times as long as the median of the round's "
        "uploads, where there are 3 or more. 1e30: any length.",
    )
