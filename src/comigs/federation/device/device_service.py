"""A device's resident process: holds the base, does what the server asks, keeps the client's state.
No flwr.

HOME/runs/RUN is an ordinary run folder with one client. A request is answered from what is
committed there, and what came of it is committed before the answer leaves: killed at any moment, a
device is where its last answer left it.
Whoever asks again gets the same answer again, byte for byte, and nothing is trained twice.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from comigs.bases.load import Base, load_base
from comigs.client.client import Client, Workplace
from comigs.config import BaseSection, Config, Text, parse_config
from comigs.data.prepare import ClientData, prepare_client
from comigs.engines.client_task import run_task
from comigs.experts.attach import Attachment
from comigs.federation import messages
from comigs.federation.device.device_run import DeviceRun, Refused, open_folder, refusing
from comigs.federation.messages import Request, our_version
from comigs.methods.method import Method
from comigs.server import wire
from comigs.server.protocol import Report
from comigs.slots import Slot

MOST = 1 << 33  # bytes of a request
MOST_HEADER = 1 << 25
Say = Callable[[str], None]


@dataclass(frozen=True)
class Device:
    """What a device's owner decides.

    name: of the client. text: as in a config's [[clients]]. home: where state and tokens go, for
    its owner only.
    root: where relative paths in `text` start. base: a local folder or name to load instead of what
    the server names; it must be the same model. accelerator: as base.device. threads: CPU threads;
    None: as torch finds them.
    """

    name: str
    text: str | Text
    home: Path
    root: Path = Path()
    base: str | None = None
    accelerator: str = "auto"
    threads: int | None = None


class Trainer:
    """One device. `answer` is all it does; `link.serve` lets a ClientApp ask it."""

    def __init__(
        self, device: Device, say: Say = print, report: Report = lambda event: None
    ) -> None:
        """say: gets lines for the owner, also what goes wrong, in full. report: gets steps as they
        are done.
        """
        self.device, self.say, self.report = device, say, report
        device.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in ("runs", "cache"):
            (device.home / folder).mkdir(mode=0o700, exist_ok=True)
        self._base: tuple[BaseSection, Base] | None = None
        self._data: tuple[Config, ClientData] | None = None

    def answer(self, raw: bytes) -> bytes:
        """The answer to a request; whatever goes wrong is a refusal that holds a code and nothing
        else.
        """
        try:
            return self._answer(raw)
        except Refused as refused:
            self.say(refused.line)
            self._data = None  # its owner may change the text now
            return _refusal(refused.code)
        except Exception as error:
            self.say(traceback.format_exc())
            return _refusal("failed", type(error).__name__)

    def _answer(self, raw: bytes) -> bytes:
        request, tensors = _read(raw)
        with refusing("not-ready"), ExitStack() as stack:
            config, method = self._plan(request)
            base = self._base_for(config.base, request.base)
            config = _resolved(config, base)
            data = self._data_for(config, base)
            folder = open_folder(
                self.device.home / "runs" / request.run, config, base, data, request.after
            )
            run = DeviceRun(stack.enter_context(folder), config, method)
            if request.kind == "exchange" and run.is_answered(request.round, request.after):
                self.say(f"{request.run}: what was answered in round {run.answered} is sent again")
                return run.said()
            attachment = Attachment(
                base.model, base.architecture, config.experts, summed=method.mixing == "sum"
            )
            stack.enter_context(attachment)
            place = Workplace(config, method, base, attachment)
            client = Client(self.device.name, place, data, run.state())
            if request.kind == "probe":
                return _probe(request, tensors, run, client)
            return self._exchange(request, tensors, run, client)

    def _plan(self, request: Request) -> tuple[Config, Method]:
        """The config as this device runs it. Raises Refused for what it does not do."""
        device = self.device
        with refusing("refused"):
            told = parse_config(request.config, "the server's config")
            names = [client.name for client in told.clients]
            if names != [device.name]:
                raise Refused(
                    "refused",
                    f"the server asked for {', '.join(names)}, but this device is {device.name}",
                )
            if request.kind == "exchange" and request.train != (request.round <= told.rounds):
                raise Refused(
                    "refused", f"the server asked for round {request.round} of {told.rounds}"
                )
            method = messages.federable_method(told)
        entry = told.clients[0].model_copy(update={"text": device.text})
        data = told.data.model_copy(
            update={"root": device.root.resolve(), "cache": (device.home / "cache").resolve()}
        )
        own = {
            "name": device.base or told.base.name,
            "device": device.accelerator,
            "threads": device.threads,
        }
        sections = {"clients": (entry,), "data": data, "base": told.base.model_copy(update=own)}
        return told.model_copy(update=sections), method

    def _base_for(self, section: BaseSection, fingerprint: str) -> Base:
        """The base, kept for as long as the same is asked for."""
        if self._base is None or self._base[0] != section:
            if section.threads is not None:
                torch.set_num_threads(section.threads)
            self._base = self._data = None  # never two at once
            self.say(f"loading base {section.name}")
            self._base = section, load_base(section)
        base = self._base[1]
        if base.fingerprint != fingerprint:
            raise Refused(
                "base",
                f'base "{section.name}" ({base.dtype}) is not the one of this run: weights, dtype or tokenizer differ',
            )
        return base

    def _data_for(self, config: Config, base: Base) -> ClientData:
        """The text as tokens, kept likewise."""
        if self._data is None or self._data[0] != config:
            self._data = config, prepare_client(config, self.device.name, base.encoder, self.say)
        return self._data[1]

    def _exchange(
        self, request: Request, tensors: wire.Encoded, run: DeviceRun, client: Client
    ) -> bytes:
        """Do what is asked, keep what came of it, and only then answer."""
        download = _download(tensors)
        with refusing("loss"):
            reply = run_task(client, request.task, run.unseen(download, request.since), self.report)
            try:
                sent = wire.encode(
                    reply.upload or {}, download, run.config.upload.format, run.residual()
                )
            except wire.WireError as error:
                raise Refused(
                    "loss", f"{run.folder.path}: round {request.round}: {error}"
                ) from None
        head = messages.Answered(
            run=request.run,
            round=request.round,
            trained=request.train,
            metrics=[line.as_json() for line in reply.metrics],
            timing=reply.timing.as_json(),
        )
        raw = wire.pack(head, sent[0])
        with refusing("disk"):
            run.keep(request.round, raw, reply, client, sent[1], download)
        done = "trained and answered" if request.train else "has its own model"
        self.say(
            f"{request.run}: round {min(request.round, run.config.rounds)} of {run.config.rounds}: {done}"
        )
        return raw


def _read(raw: bytes) -> tuple[Request, dict[str, Tensor]]:
    try:
        request, tensors = wire.unpack(raw, messages.REQUESTS, MOST, MOST_HEADER)
    except wire.WireError as error:
        raise Refused("unreadable", f"the server sent {error}") from None
    if request.comigs != our_version():
        raise Refused(
            "version",
            f"the server has comigs {request.comigs}, this device {our_version()}; install the same one",
        )
    return request, tensors


def _download(tensors: wire.Encoded) -> dict[Slot, Tensor]:
    try:
        return wire.decode_download(tensors)
    except wire.WireError as error:
        raise Refused("unreadable", f"the server sent {error}") from None


def _probe(request: Request, tensors: wire.Encoded, run: DeviceRun, client: Client) -> bytes:
    """Measure others' uploads in this client's place. Nothing is kept."""
    if run.answered != request.round:
        raise Refused(
            "ahead",
            f"asked to measure round {request.round}, but round {run.answered} was the last here",
        )
    uploads: dict[str, dict[str, Tensor]] = {str(number): {} for number in range(request.probed)}
    for name, tensor in tensors.items():
        number, _, slot = name.partition("/")
        if number not in uploads:
            raise Refused("unreadable", "the server sent a tensor of nobody's upload")
        uploads[number][slot] = tensor
    nats = client.probe({number: _download(of) for number, of in uploads.items()}, request.round)
    if not all(map(math.isfinite, nats.values())):
        raise Refused(
            "loss",
            f"{run.folder.path}: round {request.round}: another client's upload has no finite loss here",
        )
    return wire.pack(
        messages.Probed(run=request.run, round=request.round, nats=list(nats.values()))
    )


def _resolved(config: Config, base: Base) -> Config:
    """The config with what this device decided filled in."""
    dtype = str(base.dtype).removeprefix("torch.")
    own = {"dtype": dtype, "device": str(base.device), "threads": torch.get_num_threads()}
    return config.model_copy(update={"base": config.base.model_copy(update=own)})


def _refusal(code: messages.Code, error: str = "") -> bytes:
    return wire.pack(messages.Refusal(code=code, comigs=our_version(), error=error))
