"""The page of `comigs audit`, and its table. It has no text of clients, only what was made up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from comigs.config import Config
from comigs.experiments.audit.figures import Row
from comigs.runs.report.page import put_page, render
from comigs.text import Table

HERE = Path(__file__).parent
AUDIT = "audit"  # the name of its files in a run folder
HEADERS = (
    "guessed from", "copies", "canaries", "told apart", "median rank", "exposure (bits)",
    "right guesses", "epsilon at least", "epsilon promised",
)  # fmt: skip


def table(found: Sequence[Row]) -> Table:
    """Return the rows as people read them."""
    cells = []
    for row in found:
        told = (f"{row.told_apart:.2f}", f"{row.rank:.0%}", f"{row.exposure:.1f}")
        guesses = f"{row.correct} of {row.guesses}"
        counts = (str(row.copies), str(row.canaries))
        promised = "none"
        if row.promised is not None:
            promised = f"{row.promised:.3g} at delta {row.delta:.2g}"
        if row.exceeds:
            promised += ": EXCEEDED"
        cells.append((row.seen, *counts, *told, guesses, f"{row.epsilon:.2f}", promised))
    return Table(HEADERS, tuple(cells))


def write_page(path: Path, config: Config, canaries: int, found: Sequence[Row]) -> Path:
    """Write the page of an audit, and return where it is. Raises UserError."""
    text = render(
        "audit.html.j2",
        HERE,
        name=config.name,
        method=config.method,
        base=config.base.name,
        clients=len(config.clients),
        rounds=config.rounds,
        steps=config.client.steps,
        canaries=canaries,
        promise=config.privacy.promise,
        rows=table(found),
    )
    return put_page(path, text, "audit")
