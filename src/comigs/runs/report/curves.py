"""What the plots draw: points by round, out of the metrics of a run. No drawing here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from comigs.runs.report.read import Run
from comigs.runs.report.results import mean, results

Points = tuple[tuple[float, float], ...]
MAX_STEP_POINTS = 300  # per client; more steps are averaged in equal bins
MAX_PANELS = 12


@dataclass(frozen=True)
class LossCurves:
    """Mean nats per token of one client over rounds. `base` is None where it was not measured on
    valid.
    """

    client: str
    by_step: Points
    by_round: Points
    valid: Points
    base: float | None

    @property
    def values(self) -> list[float]:
        """Everything drawn, to find the limits of the axes."""
        points = [y for line in (self.by_step, self.by_round, self.valid) for _, y in line]
        return points if self.base is None else [*points, self.base]


@dataclass(frozen=True)
class Line:
    """One client's value over rounds."""

    client: str
    points: Points


def loss_curves(run: Run) -> tuple[LossCurves, ...]:
    """One per client that has anything to draw, in the run's order; at most MAX_PANELS, those that
    gained least.
    """
    drawn = [c for c in (_loss(run, name) for name in run.clients) if c.values]
    if len(drawn) > MAX_PANELS:
        gains = {c.name: c.gain for c in results(run).clients}
        known = {name: math.inf if g is None else g for name, g in gains.items()}
        kept = {c.client for c in sorted(drawn, key=lambda c: known[c.client])[:MAX_PANELS]}
        drawn = [c for c in drawn if c.client in kept]
    return tuple(drawn)


def share_lines(run: Run) -> tuple[Line, ...]:
    """Each client's generalist share in training, mean over blocks, by round; only clients with a
    router.
    """
    lines = []
    for name in run.clients:
        points = tuple(
            (float(t.round), value)
            for t in run.train
            if t.client == name and (value := mean(t.generalist_share_by_layer or ())) is not None
        )
        lines.append(Line(name, points))
    return tuple(line for line in lines if line.points)


def drift_points(run: Run) -> Points:
    """Drift of the generalists by round; empty where nothing is shared."""
    return tuple((float(d.round), d.drift) for d in run.drift if d.drift is not None)


def _loss(run: Run, name: str) -> LossCurves:
    by_step: list[tuple[float, float]] = []
    by_round: list[tuple[float, float]] = []
    for line in (t for t in run.train if t.client == name):
        steps = line.train_nats_per_token_by_step
        by_step += [
            (line.round - 1 + (i + 1) / len(steps), y) for i, y in enumerate(steps) if y is not None
        ]
        if line.train_nats_per_token is not None:
            by_round.append(
                (line.round - 0.5, line.train_nats_per_token)
            )  # the mean of a round: drawn at its middle
    valid = [e for e in run.evaluations if e.client == name and e.split == "valid"]
    base = [e.score.nats_per_token for e in valid if e.model == "base"]
    return LossCurves(
        client=name,
        by_step=_thinned(by_step),
        by_round=tuple(by_round),
        valid=tuple(
            (float(e.round), e.score.nats_per_token)
            for e in valid
            if e.model == "personal" and e.score.nats_per_token is not None
        ),
        base=base[-1] if base else None,
    )


def _thinned(points: Sequence[tuple[float, float]]) -> Points:
    """At most MAX_STEP_POINTS points, each the mean of a bin."""
    width = math.ceil(len(points) / MAX_STEP_POINTS) or 1
    bins = [points[i : i + width] for i in range(0, len(points), width)]
    return tuple((sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in bins)
