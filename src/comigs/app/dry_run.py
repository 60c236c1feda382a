"""`comigs run --dry-run`: what a run would train, send, hold and take."""

from __future__ import annotations

from typing import Any

from comigs.app.budget import budgets
from comigs.app.estimate import (
    available_memory,
    measured_pace,
    memory_needed,
    require_memory,
    run_seconds,
)
from comigs.app.setup import Say, attached, ignore, load, read_texts
from comigs.bases.load import Base
from comigs.config import Config
from comigs.data.prepare import require_text
from comigs.methods.method import load_method
from comigs.runs.metrics import Note
from comigs.server.protocol import Report
from comigs.text import Table, duration, listed, size


def dry_run(config: Config, report: Report = ignore, say: Say = ignore) -> tuple[Table, list[str]]:
    """What a run of this config would take: a table of its clients, and lines on memory and time.

    Text is prepared and two steps are timed; nothing else is written or trained. Raises UserError
    as `run` does.
    """
    method = load_method(config)
    require_text(config)
    base, config = load(config, say)
    data = read_texts(config, base, report, say)
    with attached(config, base) as (attachment, shapes):
        needed = memory_needed(config, base, shapes, attachment)
        require_memory(needed, base.device)
        report(Note(message="timing two steps"))
        pace = measured_pace(config, base, shapes, attachment)
    store = data.load(data.names[0]).train[0]
    seconds = run_seconds(config, method, pace, data.outlines(), store.num_tokens / store.num_bytes)
    tokens = config.client.batch_size * config.data.sequence_length
    return _plan_table(config, base), [
        f"a local step of {tokens:,} tokens takes {pace.step_seconds:.2g} s here, the run about {duration(seconds)}",
        f"memory: about {size(needed)} at its peak, {size(available_memory(base.device))} free on {base.device}",
    ]


def _plan_table(config: Config, base: Base) -> Table:
    """Clients by what they train and send; those alike in one row."""
    alike: dict[tuple[Any, ...], list[str]] = {}
    method = load_method(config)
    for entry, (name, budget) in zip(config.clients, budgets(config, base).items(), strict=True):
        alike.setdefault((method.shape(config.shape_of(entry)), budget), []).append(name)
    rows = [
        (listed(names), str(shape.generalists), str(shape.specialists), f"{budget.trained_parameters:,}",
         f"{budget.router_parameters:,}", size(budget.uploaded_bytes), size(budget.downloaded_bytes))
        for (shape, budget), names in alike.items()
    ]  # fmt: skip
    headers = (
        "client",
        "generalists",
        "specialists",
        "trained",
        "router",
        "up / round",
        "down / round",
    )
    return Table(headers, tuple(rows))
