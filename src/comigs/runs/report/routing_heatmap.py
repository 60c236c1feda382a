"""The routing heatmap: an HTML table, so that it reads, wraps, prints and follows the page's
colours like text.
"""

from __future__ import annotations

from dataclasses import dataclass

from comigs import text as f
from comigs.runs.metrics import Evaluation, Train
from comigs.runs.report.read import Run
from comigs.runs.report.results import mean


@dataclass(frozen=True)
class Cell:
    """One number; `role` is the side it leans to, `strength` how far (0: balanced at 0.5, 1:
    wholly).
    """

    text: str
    role: str
    strength: float


@dataclass(frozen=True)
class HeatMap:
    """Rows of (client, cells: the mean, then one per block); `source` says what was measured."""

    layers: int
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    without: tuple[str, ...]  # clients without a router
    source: str


def routing_heatmap(run: Run) -> HeatMap | None:
    """Generalist share per client and block in the latest evaluation, else in training; None where
    nothing routes.
    """
    split = "test" if run.summary else "valid"
    measured = [e for e in run.evaluations if (e.split, e.model) == (split, "personal")]
    evaluated = [e for e in measured if e.generalist_share_by_layer]
    trained = [t for t in run.train if t.generalist_share_by_layer]
    latest: dict[str, Evaluation | Train] = {line.client: line for line in evaluated or trained}
    if not latest:
        return None
    layers = max(len(line.generalist_share_by_layer or ()) for line in latest.values())
    rows = []
    for name in run.clients:
        if name in latest:
            shares = latest[name].generalist_share_by_layer or ()
            padded = (*shares, *[None] * (layers - len(shares)))
            rows.append((name, tuple(_cell(v) for v in (mean(shares), *padded))))
    return HeatMap(
        layers=layers,
        rows=tuple(rows),
        without=tuple(name for name in run.clients if name not in latest),
        source=f"the {split} text" if evaluated else "the last round's training text",
    )


def _cell(share: float | None) -> Cell:
    if share is None:
        return Cell(f.NONE, "none", 0.0)
    lean = min(1.0, abs(share - 0.5) * 2)
    return Cell(f.share(share), "generalist" if share > 0.5 else "specialist", round(lean, 3))
