"""This module is what server and device say to each other: the heads of their messages. No flwr."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat, PositiveInt, TypeAdapter

from comigs import __version__
from comigs.config import Config, DataSection, ParticipationSection, Split
from comigs.data.prepare import require_own_text_only
from comigs.errors import UserError
from comigs.federation.sum_messages import (
    Announced,
    OpenedRound,
    RunId,
    SealedRound,
    SumRequest,
)
from comigs.methods.loading import list_methods, load_method
from comigs.methods.method import Method
from comigs.privacy.budget import SPENT
from comigs.runs.metrics import ClientReport, Timing, TrainReport
from comigs.runs.record import OrLeftOut
from comigs.server.protocol import Task
from comigs.server.wire import Head

RUN_ID = ".run-id"  # a file in the server's run folder: what devices call the run
PROGRESS = ".progress.jsonl"  # likewise: a line for each event, for whoever watches
LARGEST = 10**6  # of whatever is counted: rounds, steps, windows, tokens of a window
UPLOADS = 4096  # of other clients, measured at once
LAYERS, EXPERTS = 1024, 1024  # of a prior
Version = Annotated[str, Field(pattern=r"^[0-9A-Za-z.+_-]{1,32}$")]
Number = Annotated[int, Field(ge=0, le=LARGEST + 1)]  # of a round; the last exchange is one more
Share = Annotated[float, Field(ge=0, le=1)]
Priors = Annotated[
    tuple[Annotated[tuple[Share, ...], Field(max_length=EXPERTS)], ...], Field(max_length=LAYERS)
]
Splits = Annotated[tuple[Split, ...], Field(max_length=3)]
Kind = Literal["exchange", "probe", "announce", "seal", "open"]
Code = Literal[
    "unreadable",
    "version",
    "refused",
    "not-ready",
    "base",
    "disk",
    "memory",
    "time",
    "budget",
    "unbounded",
    "loss",
    "over",
    "ahead",
    "lost",
    "failed",
]
SAID: dict[Code, str] = {  # what the server makes of a code; the device says the rest to its owner
    "unreadable": "could not read the request",
    "version": "has another comigs",
    "refused": "does not do what this config asks for",
    "not-ready": "not ready",
    "base": "has another base, or its owner allows no other",
    "disk": "cannot write to its disk, or has too little room on it",
    "memory": "needs more memory for this config than it has, or its owner allows",
    "time": "would take longer with this config than its owner allows",
    "budget": SPENT,
    "unbounded": 'takes part only in runs with privacy.level = "document", as its owner says',
    "loss": "its loss is not finite",
    "over": "asked for a round that it has left behind",
    "ahead": "asked for something of a round that it has not done",
    "lost": "has lost its state of this run",
    "failed": "failed",
}


OF_TEXT: set[Code] = {"not-ready", "time", "loss"}  # what depends on how long or hard a text is


class Request(Head):
    """A request goes to a device. Of an exchange the tensors are its download, of a probe the
    uploads to measure, as NUMBER/SLOT.

    run: the run's id. after: the last round whose answer the server has from this client, 0: none.
    since: the last round that the client answered in time; the download holds whatever was merged
    from then on. config: without anybody's text or paths, and with one client. comigs: the server's
    version. base: its fingerprint. probed: the number of uploads. prior: of a Task. sum: of a round
    whose uploads are summed unseen, whose tensors are then the download and what others sealed for
    this client.
    """

    kind: Kind
    run: RunId
    round: Annotated[Number, Field(ge=1)]
    after: Number
    since: Number
    train: bool = False
    evaluate: Splits = ()
    evaluate_base: Splits = ()
    config: dict[str, Any]
    comigs: str = Field(max_length=64)
    base: str = Field(max_length=64)
    probed: int = Field(0, ge=0, le=UPLOADS)
    prior: Annotated[Priors | None, OrLeftOut] = None
    sum: Annotated[SumRequest | None, OrLeftOut] = None

    @property
    def task(self) -> Task:
        """The task as rounds know it."""
        return Task(self.round, self.train, self.evaluate, self.evaluate_base, self.prior)

    @property
    def session(self) -> str:
        """The session that an upload is masked for; "" where there is none."""
        return self.sum.session if self.sum is not None else ""


class Answered(Head):
    """A device answers an exchange so. trained: the tensors are its upload. metrics, timing: as in
    a Reply. session: of the sum for which the upload is masked; "" where it is not.
    """

    kind: Literal["answered"] = "answered"
    run: RunId
    round: PositiveInt
    trained: bool
    metrics: list[dict[str, Any]] = Field(max_length=16)
    timing: dict[str, Any] = Field(max_length=16)
    session: str = Field("", max_length=32)


class Probed(Head):
    """A device answers a probe so. nats: per token of each upload of the request, in its order, on
    a sample of the device's valid text.
    """

    kind: Literal["probed"] = "probed"
    run: RunId
    round: PositiveInt
    nats: list[FiniteFloat] = Field(max_length=UPLOADS)


class Refusal(Head):
    """A device cannot answer. Nothing but a code, its version and the type of an error leaves the
    device.
    """

    kind: Literal["refusal"] = "refusal"
    code: Code
    comigs: Version
    error: str = Field("", pattern=r"^[A-Za-z0-9_]{0,64}$")

    def reason(self) -> str:
        """Say why in a few words, for the server's records."""
        if self.code == "version" or (self.code == "unreadable" and self.comigs != our_version()):
            return f"comigs {our_version()} here, {self.comigs} there"
        return f"{SAID[self.code]}: {self.error}" if self.error else SAID[self.code]


def refusal(code: Code, error: str = "", private: bool = False) -> Refusal:
    """Return what leaves a device of a refusal. private: what leaves may not depend on its text."""
    if private and (error or code in OF_TEXT):
        code, error = "failed", ""
    return Refusal(code=code, comigs=our_version(), error=error)


REQUESTS: TypeAdapter[Request] = TypeAdapter(Request)
Answer = Answered | Probed | Announced | SealedRound | OpenedRound
ANSWERS: TypeAdapter[Answer | Refusal] = TypeAdapter(
    Annotated[Answer | Refusal, Field(discriminator="kind")]
)


def leaving(config: Config, lines: Sequence[ClientReport], timing: Timing) -> dict[str, Any]:
    """Return what leaves a device of its lines and its timing, as an `Answered` has it.

    Where what leaves is private, that is nothing that depends on text: which settings a round had,
    and the epsilon spent, rounded up to tenths, so that documents cannot be counted from it.
    """
    if not config.privacy.by_document:
        return {"metrics": [line.as_json() for line in lines], "timing": timing.as_json()}
    told = []
    for line in lines:
        # What was measured on text, as in an evaluation, has no part that may leave.
        if isinstance(line, TrainReport):
            spent = None if line.epsilon is None else math.ceil(10 * line.epsilon) / 10
            settings = TrainReport(
                round=line.round,
                client=line.client,
                local_steps=line.local_steps,
                router_steps=line.router_steps,
                learning_rate=line.learning_rate,
                train_nats_per_token_by_step=[],
                trained_tokens=0,
                trained_parameters=line.trained_parameters,
                epsilon=spent,
            )
            told.append(settings.as_json())
    nothing = Timing(round=timing.round, client=timing.client)
    return {"metrics": told, "timing": nothing.as_json()}


def our_version() -> str:
    """Return the version of this package; both ends must have the same."""
    return __version__


def config_for(config: Config, client: str) -> dict[str, Any]:
    """Return what a device is told of the config: no text, no path of the server, nothing of other
    clients, nor where curves go.
    """
    entry = config.client_named(client).model_copy(update={"text": None})
    # A base in a folder or a file is called by its name alone; the device has one of its own.
    name = config.base.name
    if Path(name).exists():
        name = Path(name).name
    base = {"device": "auto", "threads": None, "memory": None, "name": name}
    places = {n: DataSection.model_fields[n].default for n in ("root", "cache")}
    sections = {
        "clients": (entry,),
        "participation": ParticipationSection(),
        "data": config.data.model_copy(update=places),
        "base": config.base.model_copy(update=base),
    }
    told = config.model_copy(update=sections)
    return told.model_dump(mode="json", exclude={"track", "conditions"}, exclude_none=True)


def federable_method(config: Config) -> Method:
    """Return the config's method. Raises UserError for what clients on machines of their own cannot
    or will not do.
    """
    # A device runs the comigs that is installed there, and nobody else's code.
    if config.method not in list_methods():
        raise UserError(
            f'method: "{config.method}" is not part of comigs, and devices run nothing else; '
            f"must be one of {', '.join(list_methods())}, or run it in-process"
        )
    # Nor does it follow what its owner decides.
    for field in ("base.chat_template", "privacy.noise_seed"):
        section, _, key = field.partition(".")
        if getattr(getattr(config, section), key) is not None:
            raise UserError(
                f"{field}: given, but each device decides that itself; leave it out, or run it "
                "in-process"
            )
    method = load_method(config)
    if method.centralized:
        raise UserError(
            f'method: "{config.method}" trains on the text of all clients in one place, which a '
            "federation has not; choose another method, or run it in-process"
        )
    require_own_text_only(config)
    return method
