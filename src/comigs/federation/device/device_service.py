"""This module is a device's resident process: it holds the base, does what the server asks and
keeps the client's state. No flwr.

HOME/runs/RUN is an ordinary run folder with one client. A request is answered from what is
committed there, and what came of it is committed before the answer leaves: killed at any moment, a
device is where its last answer left it. Whoever asks again gets the same answer again, byte for
byte, and nothing is trained twice.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from torch import Tensor

from comigs.bases.load import Base, as_fast, give_back, load_base, require_window
from comigs.client.client import Client
from comigs.client.estimate import Throughput
from comigs.client.workplace import workplace
from comigs.config import NAMED_BASES, BaseSection, Config, Text, parse_config
from comigs.data.prepare import ClientData, keep_only, prepare_client
from comigs.engines.client_task import run_task
from comigs.federation import messages
from comigs.federation.device.device_run import DeviceRun, Refused, open_folder, refusing
from comigs.federation.device.limits import Limits, Work, require_in_order, require_settable
from comigs.federation.device.received import probe, read_download, read_request
from comigs.federation.messages import Request
from comigs.federation.pinned_base import PinnedBase
from comigs.methods.method import Method
from comigs.server import wire
from comigs.server.protocol import Report
from comigs.server.validation import expected_upload, shapes_of
from comigs.slots import Slot
from comigs.text import Say, brief, harmless

if TYPE_CHECKING:
    from comigs.federation.device.device_sum import DeviceSum

LINE, TRACEBACK = 500, 8000  # characters of what the owner is shown


@dataclass(frozen=True)
class Device:
    """A device is what its owner decides.

    name: the client's. text: as in a config's [[clients]]. home: where state and tokens go, for the
    owner only. root: where relative paths in `text` start. base: a local folder or name to load;
    None: what `pinned` names. accelerator: as base.device. threads: CPU threads; None: as torch
    finds them. pinned: the base that the bundle allows; None: what `base` says or, without one,
    those that come with comigs. limits: what a request may need. specialists: how many the device
    has from its next round on; None: as the config says.
    """

    name: str
    text: str | Text
    home: Path
    root: Path = Path()
    base: str | None = None
    accelerator: str = "auto"
    threads: int | None = None
    pinned: PinnedBase | None = None
    limits: Limits = field(default_factory=Limits)
    specialists: int | None = None


class Trainer:
    """A trainer is one device at work: `answer` is all it does, for a SuperNode that asks."""

    def __init__(
        self, device: Device, say: Say = print, report: Report = lambda event: None
    ) -> None:
        """Begin without a base. say: called with lines for the owner, also what goes wrong, in
        full. report: called with steps as they are done.
        """
        self.device, self.report = device, report
        self.say: Say = lambda text: say(harmless(text))
        device.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in ("runs", "cache"):
            (device.home / folder).mkdir(mode=0o700, exist_ok=True)
        self._is_private = False  # whether what is asked for must tell nothing of the text
        self._base: tuple[BaseSection, Base] | None = None
        self._held: float | None = None  # bytes of this process with the base, on a CPU
        self._data: tuple[Config, ClientData] | None = None
        self._speed: tuple[Config, Throughput] | None = None

    def answer(self, raw: bytes) -> bytes:
        """Answer a request; whatever goes wrong is a refusal that holds a code and nothing else."""
        self._is_private = False
        try:
            return self._answer(raw)
        except Refused as refused:
            self.say(brief(refused.line, LINE))
            self._data = None  # its owner may change the text now
            return wire.pack(messages.refusal(refused.code, private=self._is_private))
        except Exception as error:
            self.say(traceback.format_exc()[-TRACEBACK:])
            return wire.pack(messages.refusal("failed", type(error).__name__, self._is_private))
        finally:
            give_back()

    def _answer(self, raw: bytes) -> bytes:
        request, tensors = read_request(raw, self.device.limits)
        # What the owner can change, such as the text or the disk, is no error of the run's.
        with refusing("not-ready"), ExitStack() as stack:
            config, method = self._plan(request)
            base = self._base_for(config.base, request.base)
            require_window(base, config.data.sequence_length)
            config = _resolved(config, base)

            # The base is left as it was, whatever the next request is for.
            place = workplace(config, method, base)
            stack.enter_context(place.attachment)

            # Nothing is drawn, loaded or written before it is known that it fits.
            work = Work(request, place, len(raw))
            work.require_memory(self.device.limits, self._held)
            work.require_disk(self.device.home)
            data = self._data_for(config, base)
            work.require_time(self.device.limits, self._speed_for(work), data)
            path = self.device.home / "runs" / request.run
            folder = open_folder(path, config, base, data, request.after)
            run = DeviceRun(stack.enter_context(folder), config, method)
            device_sum = self._sum_of(run, request)
            if device_sum is not None and request.kind in ("announce", "seal", "open"):
                return device_sum.answer(request)

            # A round that is done is not done again: what was said is said again.
            client = partial(Client, self.device.name, place, data)
            if request.kind == "exchange" and run.is_answered(request.round, request.after):
                self.say(f"{request.run}: what was answered in round {run.answered} is sent again")
                if device_sum is None or not device_sum.is_to_mask_again(request):
                    return run.said()
                upload, download = client(run.state()).send(request.round), read_download(tensors)
                return device_sum.mask_again(request, tensors, upload, download)
            if request.kind == "probe":
                return probe(request, tensors, run, client(run.state()))
            budget = run.budget(data, self.device.home, self.device.limits.epsilon)
            seed = device_sum.batch_seed if device_sum else None
            started = client(run.state(), budget, seed)
            return self._exchange(request, tensors, run, started, device_sum)

    def _plan(self, request: Request) -> tuple[Config, Method]:
        """Return the config as this device runs it, and its method. Raises Refused for what it does
        not do.
        """
        # The server may ask for this client only, in the order of rounds, and nobody else's code.
        device = self.device
        with refusing("refused"):
            told = parse_config(request.config, "the server's config")
            self._is_private = told.privacy.by_document
            names = [client.name for client in told.clients]
            if names != [device.name]:
                asked = f"the server asked for {', '.join(names)}"
                raise Refused("refused", f"{asked}, but this device is {device.name}")
            require_settable(told, device.limits)
            require_in_order(request, told.rounds)
            if device.specialists is not None:
                own = {"specialists": device.specialists}
                clients = (told.clients[0].model_copy(update=own),)
                told = told.model_copy(update={"clients": clients})
            method = messages.federable_method(told)
        name = self._base_name(told.base, request.base)

        # Where the text is and what it runs on is the owner's to decide.
        entry = told.clients[0].model_copy(update={"text": device.text})
        cache = (device.home / "cache").resolve()
        data = told.data.model_copy(update={"root": device.root.resolve(), "cache": cache})
        here = {"name": name, "device": device.accelerator, "threads": device.threads}
        sections = {"clients": (entry,), "data": data, "base": told.base.model_copy(update=here)}
        return told.model_copy(update=sections), method

    def _base_name(self, told: BaseSection, fingerprint: str) -> str:
        """Return the name to load the base by. Raises Refused for any but what bundle or owner
        allow, before anything is looked for.
        """
        pinned, own = self.device.pinned, self.device.base
        if pinned is not None and (difference := pinned.differs(told, fingerprint)):
            raise Refused("base", f"the server's config: {difference} in this device's bundle")
        if pinned is None and own is None and told.name not in NAMED_BASES:
            raise Refused(
                "base",
                f'the server asked for base "{told.name}", which neither the bundle nor you name; '
                "to take part with it, start again with --base and its name, or the folder of "
                "your copy",
            )
        return own or told.name

    def _base_for(self, section: BaseSection, fingerprint: str) -> Base:
        """Return the base, kept for as long as the same is asked for. Raises Refused."""
        if self._base is None or self._base[0] != section:
            if section.threads is not None:
                torch.set_num_threads(section.threads)
            # There are never two at once.
            self._base = self._data = None
            self.say(f"loading base {section.name}")
            self._base, self._held = (section, as_fast(load_base(section))), None
            if section.dtype == "bfloat16" and self._base[1].dtype != torch.bfloat16:
                self.say("this processor is slow at bfloat16: the base computes in float32")
            if self._base[1].device.type == "cpu":
                self._held = psutil.Process().memory_info().rss
        base = self._base[1]
        if base.fingerprint != fingerprint:
            raise Refused(
                "base",
                f'base "{section.name}" ({section.dtype}) is not the one of this run: '
                "weights, dtype or tokenizer differ",
            )
        return base

    def _data_for(self, config: Config, base: Base) -> ClientData:
        """Return the text as tokens, kept likewise."""
        if self._data is None or self._data[0] != config:
            data = prepare_client(config, self.device.name, base.encoder, self.say)
            keep_only(config.data.cache, data)  # a server may ask for splits without end
            self._data = config, data
        return self._data[1]

    def _speed_for(self, work: Work) -> Throughput:
        """Return how fast this machine is at a config, kept likewise."""
        config = work.place.config
        if self._speed is None or self._speed[0] != config:
            with refusing("loss"):
                self._speed = config, work.speed_here()
        return self._speed[1]

    def _sum_of(self, run: DeviceRun, request: Request) -> DeviceSum | None:
        """Return this device's part in the sums of a run whose uploads are summed unseen."""
        if not run.config.privacy.secure_aggregation:
            if request.kind in ("announce", "seal", "open"):
                raise Refused("refused", f"{request.run}: asked for a sum that no config mentions")
            return None
        # It imports Flower's primitives, which other runs do without.
        from comigs.federation.device.device_sum import DeviceSum

        return DeviceSum(self.device.home, run, self.say)

    def _exchange(
        self,
        request: Request,
        tensors: wire.Encoded,
        run: DeviceRun,
        client: Client,
        device_sum: DeviceSum | None,
    ) -> bytes:
        """Do what is asked, keep what came of it, and only then answer."""
        download = read_download(tensors)
        residual: Mapping[Slot, Tensor] = {}

        # What is wrong with a sum is known before anything is trained, and privacy spent, for it.
        sends = expected_upload(run.method, shapes_of(client.train_state.tensors), request.round)
        prepared = None
        if device_sum is not None and request.train and sends:
            prepared = device_sum.prepare(request, tensors)

        with refusing("loss"):
            unseen, number = run.unseen(download, request.since), self.device.specialists
            client, reply = run_task(client, request.task, unseen, self.report, specialists=number)
            if device_sum is not None and reply.upload:
                assert prepared is not None
                sent = device_sum.mask(prepared, reply.upload, download)
            else:
                sent, residual = run.encoded(reply.upload or {}, download, request.round)

        # The answer is kept as it is sent, to be sent again where it gets lost on its way.
        head = messages.Answered(
            run=request.run,
            round=request.round,
            trained=request.train,
            **messages.leaving(run.config, reply.metrics, reply.timing),
            session=request.session,
        )
        raw = wire.pack(head, sent)
        with refusing("disk"):
            run.keep(raw, reply, client, residual, download)
        if device_sum is not None and not request.train:
            device_sum.forget()
        done = "trained and answered" if request.train else "has its own model"
        rounds = run.config.rounds
        self.say(f"{request.run}: round {min(request.round, rounds)} of {rounds}: {done}")
        return raw


def _resolved(config: Config, base: Base) -> Config:
    """Return the config with what this device decided filled in."""
    own = {"device": str(base.device), "threads": torch.get_num_threads()}
    return config.model_copy(update={"base": config.base.model_copy(update=own)})
