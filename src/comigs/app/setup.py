"""This module makes what a run needs before its first round.

That is the base, everybody's text, and experts attached to measure their shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from comigs import csrc
from comigs.app.privacy import privacy_lines
from comigs.bases.load import Base, fast_at_bfloat16, load_base, require_window
from comigs.bases.packed import num_parameters
from comigs.client.workplace import attach
from comigs.config import SPLITS, Config
from comigs.data.prepare import Texts, prepare
from comigs.engines.workers import devices
from comigs.experts.attach import Attachment
from comigs.methods.loading import load_method
from comigs.methods.readers import Engine, unread
from comigs.privacy.accountant import require_accountant
from comigs.processes import cpus
from comigs.runs.metrics import Note
from comigs.runs.track.tracker import require_trackers, say_where
from comigs.server.protocol import Report
from comigs.server.sums import require_sums
from comigs.server.validation import shapes_of_clients
from comigs.slots import Shapes
from comigs.text import Say, large, plural


def ignore(_: Any) -> None:
    """Show nothing: the default listener."""


def say_unread(config: Config, engine: Engine, say: Say) -> None:
    """Say in a line each what of the config nothing reads, what it makes of the method, and where
    its curves go.

    Raises UserError for the method, for trackers that are unknown or not installed, for sums of too
    few clients, and where the accountant of privacy is not installed.
    """
    require_trackers(config)
    require_sums(config)
    if config.privacy.is_on:
        require_accountant()
    method = load_method(config)
    for line in (unread(config, method, engine), method.note, say_where(config)):
        if line:
            say(line)


def load(config: Config, say: Say = ignore) -> tuple[Base, Config]:
    """Return the base, and the config with everything filled in that was left to us.

    Raises UserError where base and config do not go together.
    """
    # the base is loaded with as many threads as it will be used with
    workers, threads = config.workers, config.base.threads
    if threads is None and workers > 1:
        threads = max(1, cpus() // workers)
    if threads is not None:
        torch.set_num_threads(threads)

    base = load_base(config.base)
    devices(workers, base.device)  # raises where there are not as many
    require_window(base, config.data.sequence_length)

    # one line says what the speed depends on, and another one why it is not what it could be
    parameters = num_parameters(base.model)
    dtype, threads = str(base.dtype).removeprefix("torch."), torch.get_num_threads()
    on_cpu = base.device.type == "cpu"
    device = plural(threads, "CPU thread") if on_cpu else str(base.device)
    spread = f" in each of {workers} processes" if workers > 1 else ""
    say(f"base {base.name}: {large(parameters)} parameters, {dtype}, {device}{spread}")
    if base.dtype == torch.bfloat16 and not fast_at_bfloat16(base.device):
        say("this processor is slow at bfloat16: base.dtype float32 takes a tenth of the time")
    if on_cpu and isinstance(why_not := csrc.attempt(), str):
        say(f"{why_not}: experts run in PyTorch, at a third of the speed")
    elif on_cpu and threads > 1 and not csrc.is_parallel():
        say(
            f"the C compiler here has no OpenMP: experts run on 1 of {threads} CPU threads; with "
            "COMIGS_COMPILED=0 they run in PyTorch, on all"
        )

    # a resumed run must not depend on what another machine would choose
    lr = config.client.lr or base.architecture.lr
    filled_in: dict[str, dict[str, Any]] = {
        "base": {"dtype": dtype, "device": str(base.device), "threads": threads},
        "data": {"root": config.data.root.resolve(), "cache": config.data.cache.resolve()},
        "client": {"lr": lr, "router_lr": config.client.router_lr or lr},
    }
    sections = {}
    for name, values in filled_in.items():
        sections[name] = getattr(config, name).model_copy(update=values)
    return base, config.model_copy(update=sections)


def read_texts(config: Config, base: Base, report: Report, say: Say) -> Texts:
    """Return every client's text; where all train from the start, tokenise it and say how much.

    report: gets notes on what is going on. say: gets a line for each client.
    """
    data = prepare(config, base.encoder, lambda line: report(Note(message=line)))
    # Nobody can know from the numbers of tokens what of a folder was no text.
    for line in data.notes():
        say(line)
    for line in privacy_lines(config, data):
        say(line)
    if config.data.loss == "all" and not data.has_chats:
        say("given, but without effect here: data.loss (no client has chats)")
    if not everybody_trains(config):
        clients = plural(len(data.names), "client")
        say(f"{clients}: a client's text is tokenised when it is first asked")
        return data

    width = max(len(name) for name in data.names)
    for name, client in data.load_all().items():
        amounts = []
        for split in SPLITS:
            tokens = sum(store.num_tokens for store in getattr(client, split))
            amounts.append(f"{split} {tokens:,}")
        say(f"{name:{width}}  tokens: {', '.join(amounts)}")
        for line in data.chat_lines(name):
            say(line)
    return data


def everybody_trains(config: Config) -> bool:
    """Return whether all clients are asked in every round, so that all text is needed at once."""
    return config.participation.clients_per_round is None


@contextmanager
def attached(config: Config, base: Base) -> Iterator[tuple[Attachment, dict[str, Shapes]]]:
    """Attach experts to the base, and give them with the shapes of every client's tensors."""
    method = load_method(config)
    with attach(config, method, base, config.base.recompute) as attachment:
        yield attachment, shapes_of_clients(config, method, attachment)
