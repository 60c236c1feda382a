"""What a run needs before its first round: the base, everybody's text, and experts attached to
measure their shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from comigs.bases.load import Base, load_base
from comigs.config import SPLITS, Config
from comigs.data.prepare import Texts, prepare
from comigs.engines.workers import devices
from comigs.errors import UserError
from comigs.experts import csrc
from comigs.experts.attach import Attachment
from comigs.methods.method import load_method
from comigs.processes import cpus
from comigs.runs.metrics import Note
from comigs.server.protocol import Report
from comigs.server.validation import shapes_of_clients
from comigs.slots import Shapes
from comigs.text import plural

Say = Callable[[str], None]


def ignore(_: Any) -> None:
    """The default listener: shows nothing."""


def load(config: Config, say: Say = ignore) -> tuple[Base, Config]:
    """The base, and the config with everything that was left to us filled in."""
    workers, threads = config.workers, config.base.threads
    if threads is None and workers > 1:
        threads = max(1, cpus() // workers)
    if threads is not None:
        torch.set_num_threads(threads)
    base = load_base(config.base)
    devices(workers, base.device)  # are there as many?
    window = base.model.config.max_position_embeddings
    if config.data.sequence_length > window:
        raise UserError(
            f"data.sequence_length: given {config.data.sequence_length}, but base {base.name} reads at most "
            f"{window} tokens at once; set it to {window} or less"
        )
    parameters = sum(p.numel() for p in base.model.parameters())
    dtype, threads = str(base.dtype).removeprefix("torch."), torch.get_num_threads()
    device = plural(threads, "CPU thread") if base.device.type == "cpu" else str(base.device)
    spread = f" in each of {workers} processes" if workers > 1 else ""
    say(f"base {base.name}: {large(parameters)} parameters, {dtype}, {device}{spread}")
    if base.device.type == "cpu" and isinstance(why_not := csrc.attempt(), str):
        say(f"{why_not}: experts run in PyTorch, at a third of the speed")
    lr = config.client.lr or base.architecture.lr
    settings = {
        "base": {"dtype": dtype, "device": str(base.device), "threads": threads},
        "data": {"root": config.data.root.resolve()},
        "client": {"lr": lr, "router_lr": config.client.router_lr or lr},
    }
    resolved = {
        section: getattr(config, section).model_copy(update=values)
        for section, values in settings.items()
    }
    return base, config.model_copy(update=resolved)


def large(number: int) -> str:
    """4.2 M, 135 M, 7.1 B; small numbers as they are."""
    for power, unit in ((10**9, "B"), (10**6, "M")):
        if number >= power:
            return f"{number / power:.{1 if number < 100 * power else 0}f} {unit}"
    return f"{number:,}"


def read_texts(config: Config, base: Base, report: Report, say: Say) -> Texts:
    """Every client's data: tokenised, with one line each about how much there is, where all train
    from the start.
    """
    data = prepare(config, base.encoder, lambda line: report(Note(message=line)))
    if not everybody_trains(config):
        say(
            f"{plural(len(data.names), 'client')}: a client's text is tokenised when it is first asked"
        )
        return data
    width = max(len(name) for name in data.names)
    for name, client in data.load_all().items():
        amounts = (
            f"{split} {sum(s.num_tokens for s in getattr(client, split)):,}" for split in SPLITS
        )
        say(f"{name:{width}}  tokens: {', '.join(amounts)}")
    return data


def everybody_trains(config: Config) -> bool:
    """All clients are asked in every round, so everybody's text is needed from the start."""
    return config.participation.clients_per_round is None


@contextmanager
def attached(config: Config, base: Base) -> Iterator[tuple[Attachment, dict[str, Shapes]]]:
    """Experts on the base, and the shapes of every client's tensors."""
    method = load_method(config)
    with Attachment(
        base.model, base.architecture, config.experts, summed=method.mixing == "sum"
    ) as attachment:
        yield attachment, shapes_of_clients(config, method, attachment)
