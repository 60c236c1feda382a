"""This module says what a run would train, send, hold and take, before it starts.

The memory and the time are those of the largest client (client/estimate.py), what travels follows
from an aggregation of starting tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from statistics import fmean
from typing import Any

import torch

from comigs.app.forecast import forecast_lines
from comigs.app.setup import attached, ignore, load, read_texts, say_unread
from comigs.bases.load import Base
from comigs.client.estimate import (
    Throughput,
    available_memory,
    measured_throughput,
    memory_needed,
    num_scalars,
    tokens_read,
    training_steps,
)
from comigs.client.memory import Way, all_ways, speed, within_memory
from comigs.config import SPLITS, Config, Split
from comigs.data.prepare import Outline, require_text
from comigs.engines.conditions.engine import with_machine
from comigs.errors import UserError
from comigs.experts.attach import Attachment
from comigs.experts.init import starting_tensors
from comigs.methods.loading import load_method
from comigs.methods.method import Method, RoundContext, Upload
from comigs.runs.metrics import Note
from comigs.server.communication import traffic_by_client
from comigs.server.protocol import Report
from comigs.server.rounds import task_of
from comigs.server.validation import expected_upload, shapes_of_clients
from comigs.slots import Slot
from comigs.text import Say, Table, duration, listed, size

# A run ends with its report, whose libraries are then part of its process's memory as well.
REPORT = "comigs.runs.report.page"


@dataclass(frozen=True)
class Budget:
    """A budget says what a client costs.

    trained_parameters: scalars that the client trains, without its router. router_parameters:
    scalars of the router. uploaded_bytes, downloaded_bytes: per round, the mean of two rounds, as a
    method may alternate.
    """

    trained_parameters: int
    router_parameters: int
    uploaded_bytes: float
    downloaded_bytes: float


def dry_run(
    config: Config, report: Report = ignore, say: Say = ignore
) -> tuple[list[Table], list[str]]:
    """Return a table of what clients would train and send, on a CPU one of what less memory would
    cost, and lines on time and memory.

    Text is prepared, two steps are timed, and on a CPU one of each way to take less memory; nothing
    of what they train is kept, and nothing else is written. Raises UserError as `run` does.
    """
    # all that a run needs is loaded as a run does, so that what would stop it is said here
    method = load_method(config)
    require_text(config)
    say_unread(config, "in-process", say)
    base, config = load(config, say)
    data = read_texts(config, base, report, say)
    import_module(REPORT)
    config = _chosen(config, base, say)
    with attached(config, base) as (attachment, shapes):
        needed = memory_needed(config, base, shapes, attachment)
        require_memory(needed, base.device)
        # Steps that were timed leave more in memory than a run finds when it chooses.
        ways = all_ways(config, base, shapes, attachment)
        report(Note(message="timing two steps"))
        throughput = measured_throughput(config, base, shapes, attachment)
        config = with_machine(config, lambda: throughput.step_seconds)

    # the first text stands for all: reading the others would take as long as preparing them
    store = data.load(data.names[0]).train[0]
    tokens_per_byte = store.num_tokens / store.num_bytes
    expected = _tokens(data.outlines(), tokens_per_byte)
    slots = set[Slot]().union(*shapes.values())
    seconds = run_seconds(config, method, slots, throughput, expected)
    tokens = config.client.batch_size * config.data.sequence_length
    peak = f"about {size(needed)} at its peak, "
    if config.base.memory is not None:
        peak = ""  # it was said with what was chosen
    tables = [_client_table(config, method, base)]
    if base.device.type == "cpu":
        report(Note(message="timing ways to take less memory"))
        tables.append(_memory_table(ways, base))
    lines = [
        f"a local step of {tokens:,} tokens takes {throughput.step_seconds:.2g} s here, "
        f"the run about {duration(seconds)}",
        f"memory: {peak}{size(available_memory(base.device))} free on {base.device}",
    ]
    if config.conditions.given:
        report(Note(message="letting the rounds go by without training"))
        lines += forecast_lines(config, method, shapes, expected)
    return tables, lines


def fitted(config: Config, base: Base, say: Say) -> Config:
    """Return the config as this machine runs it: below base.memory, and with the speed that it then
    has, where conditions ask for it. Raises UserError where there is too little memory.
    """
    if config.base.memory is not None:
        import_module(REPORT)
    config = _chosen(config, base, say)
    with attached(config, base) as (attachment, shapes):
        require_memory(memory_needed(config, base, shapes, attachment), base.device)
        return with_machine(
            config, lambda: measured_throughput(config, base, shapes, attachment).step_seconds
        )


def _chosen(config: Config, base: Base, say: Say) -> Config:
    """Return the config that stays below base.memory, and say what it does for that.

    Raises UserError where none does.
    """
    with attached(config, base) as (attachment, shapes):
        way = within_memory(config, base, shapes, attachment)
    if way is None:
        return config
    say(f"memory: {way}, about {size(way.needed)} of the {config.base.memory} allowed")
    return way.config


def _memory_table(ways: Sequence[Way], base: Base) -> Table:
    """Return the ways to train in less memory, with the speed of each."""
    # Of those with one budget, a run takes the first.
    first: dict[str, Way] = {}
    for way in ways:
        first.setdefault(way.budget, way)
    speeds = []
    for way in first.values():
        with attached(way.config, base) as (attachment, shapes):
            speeds.append(speed(way, base, shapes, attachment))
    rows = []
    for way, each in zip(first.values(), speeds, strict=True):
        rows.append((way.budget, str(way), f"{each / speeds[0]:.2f}"))
    return Table(("base.memory", "chosen", "relative speed"), tuple(rows))


def _client_table(config: Config, method: Method, base: Base) -> Table:
    """Return the clients with what they train and send; those alike share a row."""
    alike: dict[tuple[Any, ...], list[str]] = {}
    for entry, (name, budget) in zip(config.clients, budgets(config, base).items(), strict=True):
        alike.setdefault((method.shape(config.shape_of(entry)), budget), []).append(name)

    # a table of fifty clients that differ in nothing but their text would say less
    rows = []
    for (shape, budget), names in alike.items():
        rows.append(
            (
                listed(names),
                str(shape.generalists),
                str(shape.specialists),
                f"{budget.trained_parameters:,}",
                f"{budget.router_parameters:,}",
                size(budget.uploaded_bytes),
                size(budget.downloaded_bytes),
            )
        )
    experts, travel = ("generalists", "specialists"), ("up / round", "down / round")
    return Table(("client", *experts, "trained", "router", *travel), tuple(rows))


def budgets(config: Config, base: Base) -> dict[str, Budget]:
    """Return each client's budget, by name."""
    method, names = load_method(config), config.names
    with Attachment(base.model, base.architecture, config.experts) as attachment:
        shapes = shapes_of_clients(config, method, attachment)

    # the server's merge is really done, once for each kind of round: a method alone knows its sizes
    trainers = names[:1] if method.centralized else names
    equal = dict.fromkeys(names, 1.0)
    peer_losses = dict.fromkeys(names, equal) if method.reads_peers else {}
    context = RoundContext(tuple(names), equal, peer_losses)
    sent, received = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    for number in (1, 2):
        uploads: dict[str, Upload] = {}
        for name in trainers:
            slots = expected_upload(method, shapes[name], number)
            uploads[name] = starting_tensors(slots, config.seed, name)
        downloads, _ = method.aggregate(uploads, {}, context)
        everyone: dict[str, Upload] = {name: uploads.get(name, {}) for name in names}
        moved = traffic_by_client(everyone, downloads, config.upload.format, method.reads_peers)
        for name in names:
            sent[name] += moved[name].uploaded_bytes
            received[name] += moved[name].downloaded_bytes

    # a tensor counts as trained that is trained in either kind of round
    result = {}
    for name in names:
        trained, router = {}, {}
        for slot, dims in shapes[name].items():
            if slot.is_frozen:
                continue
            if slot.role == "router":
                router[slot] = dims
            elif method.trains(slot, 1) or method.trains(slot, 2):
                trained[slot] = dims
        result[name] = Budget(
            trained_parameters=num_scalars(trained),
            router_parameters=num_scalars(router),
            uploaded_bytes=sent[name] / 2,
            downloaded_bytes=received[name] / 2,
        )
    return result


def require_memory(needed: float, device: torch.device) -> None:
    """Raise UserError where a run that needs so many bytes would not fit."""
    free = available_memory(device)
    if needed > free:
        raise UserError(
            f"memory: this run needs about {size(needed)}, but {device} has {size(free)} free; set "
            "client.micro_batch_size or data.sequence_length lower, or take a smaller base"
        )


def run_seconds(
    config: Config,
    method: Method,
    slots: Collection[Slot],
    throughput: Throughput,
    tokens: Mapping[str, Mapping[Split, int]],
) -> float:
    """Return the seconds of a run at that speed, with a client at a time in each worker.

    slots: what clients have. tokens: of each client's splits.
    """
    # a round trains those that are asked, and a router phase comes after every so many steps
    asked = config.asked
    local = config.rounds * config.client.steps
    steps = training_steps(config, method, slots, local, local // config.client.router_every)
    total = asked * steps * throughput.step_seconds

    # the exchange after the last round only measures, and measures everybody
    mean: dict[Split, float] = {}
    for split in SPLITS:
        mean[split] = fmean(own[split] for own in tokens.values())
    for number in range(1, config.rounds + 2):
        task = task_of(config, number, base_known=number > 1)
        clients = asked if number <= config.rounds else len(config.clients)
        measured = (*task.evaluate, *task.evaluate_base)
        read = tokens_read(config, method, measured, mean, end=not task.train)
        total += clients * read * throughput.evaluation_seconds
    return total / min(config.workers, asked)


def _tokens(outlines: Mapping[str, Outline], tokens_per_byte: float) -> dict[str, dict[Split, int]]:
    """Return about how many tokens each client's splits have."""
    tokens: dict[str, dict[Split, int]] = {}
    for name, outline in outlines.items():
        tokens[name] = {}
        for split in SPLITS:
            num_bytes = sum(text.num_bytes for text in getattr(outline, split))
            tokens[name][split] = round(num_bytes * tokens_per_byte)
    return tokens
