"""This module says what a server may ask of a device: which settings, how large, and how much
memory, disk and time they may take.

Whatever SETTABLE does not name is the owner's alone. The numbers that it names are held to a bound
before anything is computed from them, and what they need together is estimated before anything is
loaded, drawn or written.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch

from comigs.client.estimate import (
    Throughput,
    available_memory,
    batch_bytes,
    measured_throughput,
    memory_needed,
    num_scalars,
    tokens_read,
    training_steps,
)
from comigs.client.workplace import Workplace
from comigs.config import SPLITS, ClientEntry, Config, Split, dotted
from comigs.data.prepare import ClientData
from comigs.errors import require_finite
from comigs.federation.device.device_run import Refused
from comigs.federation.messages import LARGEST, Request
from comigs.server.validation import shapes_of_clients
from comigs.slots import Shapes
from comigs.text import brief, duration, one_line, size

WORD = None  # a setting that is no number: its values are few, or checked elsewhere
REAL = 1e30  # of numbers that are only computed with
EXPERTS, RANK = 256, 1 << 16
SETTABLE: Mapping[str, float | None] = {  # what a server may set -> the highest number
    "name": WORD, "method": WORD, "seed": 2**63 - 1, "rounds": LARGEST, "options": LARGEST,
    "base.name": WORD, "base.dtype": WORD, "base.weights": WORD, "base.attention": WORD,
    "base.recompute": WORD, "base.tokenizer": WORD,
    "data.sequence_length": LARGEST, "data.loss": WORD, "data.distribution": WORD,
    "data.valid_fraction": 1, "data.test_fraction": 1, "data.short_repeat": LARGEST,
    "data.train_share": 1, "data.valid_share": 1,
    "experts.generalists": EXPERTS, "experts.specialists": EXPERTS, "experts.rank": RANK,
    "experts.specialist_rank": RANK, "experts.attention_rank": RANK,
    "experts.share_attention": WORD, "experts.alpha": REAL, "experts.scaling": WORD,
    "experts.strength": WORD,
    "experts.top_k": EXPERTS, "experts.routing": WORD, "experts.router_start": REAL,
    "client.steps": LARGEST, "client.batch_size": LARGEST, "client.micro_batch_size": LARGEST,
    "client.lr": REAL, "client.router_lr": REAL, "client.weight_decay": REAL, "client.betas": 1,
    "client.router_every": LARGEST, "client.router_steps": LARGEST, "client.router_data": WORD,
    "client.prior_coef": REAL, "client.folds": LARGEST,
    "client.balance_coef": REAL, "client.generalist_share": 1,
    "evaluation.every": LARGEST, "evaluation.splits": WORD, "evaluation.keep": WORD,
    "evaluation.batch_size": LARGEST,
    "upload.format": WORD, "upload.merge": WORD, "upload.trim": 1,
    "upload.max_norm": REAL, "upload.max_norm_ratio": REAL,
    "privacy.level": WORD, "privacy.epsilon": REAL, "privacy.noise_multiplier": REAL,
    "privacy.delta": 1, "privacy.clip": REAL, "privacy.expected_batch": LARGEST,
    "privacy.secure_aggregation": WORD, "privacy.threshold": 1,
    "clients.name": WORD, "clients.specialists": EXPERTS, "clients.rank": RANK,
    "clients.specialist_rank": RANK, "clients.router_data": WORD, "clients.weight": REAL,
}  # fmt: skip
DEFAULTS = Config(clients=(ClientEntry(name="any"),))
NAME = 255  # characters of a run's name, which is a folder's
CHEAP = {  # numbers that cost neither memory nor time, however large they are
    "seed", "rounds", "data.short_repeat", "client.router_every", "client.folds",
    "evaluation.every", "privacy.epsilon", "privacy.noise_multiplier", "privacy.clip",
    "privacy.threshold",
}  # fmt: skip

SHARE = 0.8  # of the memory that is free, where the owner does not say how much
MINUTES = 120.0  # of one request: twice the time that a server waits for it by default
COPIES = 6  # of a message while it is read: its bytes, its tensors, and those in float32
ON_DISK = 48  # bytes per scalar: of what is committed, and of what replaces it
SHARED_ON_DISK = 56  # likewise, of the copy that is sent where that is private
ENOUGH = 0.5  # seconds of a step that are long enough to tell the speed by
FASTER = 4  # times the windows of a trial that was too short


@dataclass(frozen=True)
class Limits:
    """The limits are the owner's.

    memory: bytes where the model is; None: SHARE of what is free. minutes: of one request.
    only_sums: take part only in runs whose uploads are summed unseen. epsilon: of all runs
    together, which then must be private by document; None: no limit.
    """

    memory: float | None = None
    minutes: float = MINUTES
    only_sums: bool = False
    epsilon: float | None = None

    def __post_init__(self) -> None:
        """Raise UserError for a limit that would limit nothing."""
        for name in ("memory", "minutes", "epsilon"):
            limit = getattr(self, name)
            if limit is not None:
                require_finite(f"--max-{name}", limit)

    @property
    def message(self) -> int:
        """The most bytes of a request, which is read before anything else is known of it."""
        return int(self.allowed_memory(torch.device("cpu")) / COPIES)

    def allowed_memory(self, device: torch.device) -> float:
        """Return how many bytes this process may have on a device, with those that it has."""
        return self.memory or SHARE * available_memory(device)


def require_settable(told: Config, limits: Limits) -> None:
    """Raise Refused where a server sets what is not its to set, or a number beyond its bound, or
    less than the owner wants.
    """
    if limits.only_sums and not told.privacy.secure_aggregation:
        why = "this device sends its uploads into sums only (--only-sums)"
        raise _refused("privacy.secure_aggregation", False, why)
    _require_private(told, limits)
    defaults = dict(_settings(DEFAULTS))
    for field, value in _settings(told):
        # What is the owner's to decide comes as the default, or not at all.
        key = _key(field)
        if key not in SETTABLE:
            if value != defaults.get(key):
                raise _refused(field, value, "this device decides that itself")
            continue

        # A word is shown to people and written into files, a number is computed with.
        if isinstance(value, str) and (len(value) > NAME or one_line(value) != value):
            raise _refused(field, value, f"one line of at most {NAME} characters is allowed")
        most = SETTABLE[key]
        if key == "options" and isinstance(value, float):
            most = REAL
        for number in value if isinstance(value, tuple) else (value,):
            is_number = isinstance(number, int | float) and not isinstance(number, bool)
            if is_number and most is not None and not abs(number) <= most:
                raise _refused(field, number, f"this device allows {most:.15g} at most")


def _require_private(told: Config, limits: Limits) -> None:
    """Raise Refused where the owner has set a budget and a run would spend without counting."""
    if limits.epsilon is not None and told.privacy.level != "document":
        raise Refused(
            "unbounded",
            f'the server\'s config: privacy.level: given "{told.privacy.level}", which bounds '
            f'nothing by itself; this device allows "document" only (--max-epsilon '
            f"{limits.epsilon:g})",
        )


def require_in_order(request: Request, rounds: int) -> None:
    """Raise Refused where the rounds that a request names are none of a run of so many."""
    exchange = request.kind == "exchange"
    last = rounds + 1 if exchange else rounds  # the last exchange comes after the last round
    wrong = request.round > last or max(request.after, request.since) > request.round
    if wrong or (exchange and request.train != (request.round <= rounds)):
        raise Refused("refused", f"the server asked for round {request.round} of {rounds}")


def _settings(config: Config) -> Iterator[tuple[str, Any]]:
    """Give each setting with its value; those of the first client as clients.NAME_OF_SETTING."""
    tree = config.model_dump()
    yield from dotted(tree | {"clients": dict(tree["clients"][0])})


def _key(field: str) -> str:
    """Return a setting's name in SETTABLE, where the options of all methods are one."""
    return "options" if field.startswith("options.") else field


def _refused(field: str, value: object, why: str) -> Refused:
    return Refused("refused", f"the server's config: {field}: given {brief(value, 40)}; {why}")


@dataclass(frozen=True)
class Work:
    """Work is what one request asks for, and where it would be done. message: its bytes."""

    request: Request
    place: Workplace
    message: int

    @cached_property
    def shapes(self) -> dict[str, Shapes]:
        """The shapes of the client's tensors, by its name."""
        place = self.place
        return shapes_of_clients(place.config, place.method, place.attachment)

    def require_memory(self, limits: Limits, held: float | None) -> None:
        """Raise Refused where it needs more memory than is allowed. held: as in memory_needed."""
        # What comes as a message and what a batch is drawn as is on the CPU, wherever the model is.
        place, cpu = self.place, torch.device("cpu")
        config, base = place.config, place.base
        needed = memory_needed(config, base, self.shapes, place.attachment, held)
        needed += COPIES * self.message
        self._require(needed, limits.allowed_memory(base.device), base.device)
        if base.device.type != "cpu":
            rss = psutil.Process().memory_info().rss
            needed = rss + batch_bytes(config) + COPIES * self.message
            self._require(needed, SHARE * available_memory(cpu), cpu)

    def _require(self, needed: float, allowed: float, device: torch.device) -> None:
        if not needed <= allowed:
            raise Refused(
                "memory",
                f"{self._named()} needs about {size(needed)} of memory on {device}, but "
                f"{size(allowed)} are allowed (--max-memory){self._asked()}",
            )

    def require_disk(self, home: Path) -> None:
        """Raise Refused where it would take more than half of what is free on the disk, which so is
        never filled.
        """
        (shapes,) = self.shapes.values()
        each = ON_DISK + SHARED_ON_DISK * self.place.config.privacy.by_document
        needed = each * num_scalars(shapes) + self.message
        allowed = shutil.disk_usage(home).free / 2
        if not needed <= allowed:
            raise Refused(
                "disk",
                f"{self._named()} needs about {size(needed)} of disk, but {size(allowed)} are "
                f"allowed in {home}, half of what is free{self._asked()}",
            )

    def require_time(self, limits: Limits, speed: Throughput, data: ClientData) -> None:
        """Raise Refused where it would take longer than is allowed."""
        seconds = self.seconds(speed, data)
        if not seconds <= 60 * limits.minutes:
            raise Refused(
                "time",
                f"{self._named()} would take {duration(seconds, 'about')}, but "
                f"{limits.minutes:g} minutes are allowed (--max-minutes){self._asked()}",
            )

    def seconds(self, speed: Throughput, data: ClientData) -> float:
        """Return the seconds that it would take at that speed."""
        config, method, request = self.place.config, self.place.method, self.request
        tokens: dict[Split, float] = {}
        for split in SPLITS:
            tokens[split] = sum(store.num_tokens for store in getattr(data, split))

        # A router phase may begin in this round wherever the rounds before have ended.
        steps = 0.0
        if request.train:
            phases = math.ceil(config.client.steps / config.client.router_every)
            (shapes,) = self.shapes.values()
            steps = training_steps(config, method, shapes, config.client.steps, phases)

        # Whoever is asked for a probe measures nothing but others' uploads.
        asked = (*request.evaluate, *request.evaluate_base)
        read = float(request.probed * method.probe * config.data.sequence_length)
        if request.kind == "exchange":
            read = tokens_read(config, method, asked, tokens, end=not request.train)
        return steps * speed.step_seconds + read * speed.evaluation_seconds

    def speed_here(self) -> Throughput:
        """Return how fast this machine is at the config, by trials that are kept short."""
        place, windows = self.place, 1
        config, batch = place.config, place.config.client.batch_size
        most = min(batch, config.client.micro_batch_size or batch)
        # Few windows are timed first, and more only while that takes no time to speak of.
        while True:
            sizes = {"batch_size": windows, "micro_batch_size": None}
            sections = {
                "client": config.client.model_copy(update=sizes),
                "evaluation": config.evaluation.model_copy(update={"batch_size": windows}),
            }
            trial = config.model_copy(update=sections)
            found = measured_throughput(trial, place.base, self.shapes, place.attachment)
            if windows == most or found.step_seconds > ENOUGH:
                step_seconds = found.step_seconds / windows * batch
                return Throughput(step_seconds, found.evaluation_seconds)
            windows = min(most, FASTER * windows)

    def _named(self) -> str:
        return f"{self.request.run}: round {self.request.round}"

    def _asked(self) -> str:
        """Say which numbers of the config are above the defaults, for they are what it takes."""
        defaults, above = dict(_settings(DEFAULTS)), []
        for field, value in _settings(self.place.config):
            is_cost = _key(field) in SETTABLE and field not in CHEAP and type(value) is int
            if is_cost and value > (defaults.get(field) or 1):
                above.append(f"{field} {value:,}")
        return f"; asked for: {', '.join(above)}" if above else ""
