"""The routing heatmap: a table, so that it reads, wraps, prints and has colours like text."""

from __future__ import annotations

from dataclasses import dataclass

from comigs import text as f
from comigs.runs.metrics import Measured, Train
from comigs.runs.report.read import Run
from comigs.runs.report.results import mean


@dataclass(frozen=True)
class Cell:
    """One number of the heatmap.

    role: the side the number leans to. strength: how far (0: balanced at 0.5, 1: wholly).
    """

    text: str
    role: str
    strength: float


@dataclass(frozen=True)
class HeatMap:
    """Rows of (client, cells: the mean, then one per block, what is said instead of cells).

    without: clients without a router. source: what was measured, in words.
    """

    layers: int
    rows: tuple[tuple[str, tuple[Cell, ...], str], ...]
    without: tuple[str, ...]
    source: str


def routing_heatmap(run: Run) -> HeatMap | None:
    """Return the generalist share per client and block; it is None where nothing routes."""
    # The latest evaluation says most; before there is one, training says something.
    split = "test" if run.summary else "valid"
    latest: dict[str, Measured | Train] = {}
    source = f"the {split} text"
    # What a client keeps may be an earlier round's model than was measured last.
    for measured in (*run.evaluations, *run.kept):
        own = measured.split == split and measured.model == "personal"
        if own and measured.generalist_share_by_layer:
            latest[measured.client] = measured
    if not latest:
        source = "the last round's training text"
        latest = {line.client: line for line in run.train if line.generalist_share_by_layer}
    if not latest:
        return None

    # Blocks that a client was not measured on are empty cells. Where no token has a choice, that is
    # said: a share of 0 would say that all of the model is the client's own.
    shares = {name: line.generalist_share_by_layer or [] for name, line in latest.items()}
    layers = max(map(len, shares.values()))
    rows: list[tuple[str, tuple[Cell, ...], str]] = []
    for name in run.clients:
        if name not in shares:
            continue
        if said := without_choice(latest[name], run.beside_others):
            rows.append((name, (), said))
            continue
        row = [mean(shares[name]), *shares[name], *[None] * (layers - len(shares[name]))]
        rows.append((name, tuple(cell_of(share, f.share(share)) for share in row), ""))
    without = tuple(name for name in run.clients if name not in shares)
    return HeatMap(layers, tuple(rows), without, source)


def without_choice(line: Measured | Train, beside_others: bool) -> str:
    """Say why a model's shares are no choice of its router's; "" where they are one.

    beside_others: everybody's generalist is beside a client's own experts, behind a gate.
    """
    if isinstance(line, Measured) and line.kept_part is not None:
        return f"one part: {line.kept_part}"
    if not beside_others or any(line.generalist_share_by_layer or ()):
        return ""
    adopted = line.adopted_share
    return "closed" if adopted is None else f"closed (adopted {100 * adopted:.0f} %)"


def cell_of(share: float | None, text: str) -> Cell:
    """Return the cell of a share, which may be unknown, as this text."""
    if share is None:
        return Cell(f.NONE, "none", 0.0)
    lean = min(1.0, abs(share - 0.5) * 2)
    role = "generalist" if share > 0.5 else "specialist"
    return Cell(text, role, round(lean, 3))
