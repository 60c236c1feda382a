"""What the plots draw: points by round, out of the metrics of a run. Nothing is drawn here."""

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
    """The mean nats per token of one client over rounds.

    base: None where the base was not measured on valid.
    """

    client: str
    by_step: Points
    by_round: Points
    valid: Points
    base: float | None

    @property
    def values(self) -> list[float]:
        """Everything drawn, to find the limits of the axes."""
        values = [y for _, y in (*self.by_step, *self.by_round, *self.valid)]
        if self.base is not None:
            values.append(self.base)
        return values


@dataclass(frozen=True)
class Curve:
    """One client's value over rounds."""

    client: str
    points: Points


def loss_curves(run: Run) -> tuple[LossCurves, ...]:
    """Return the curves of each client that has anything to draw, in the run's order.

    They are at most MAX_PANELS, of those clients that gained least.
    """
    drawn = [curves for name in run.clients if (curves := _loss(run, name)).values]
    if len(drawn) > MAX_PANELS:
        gains: dict[str, float] = {}
        for client in results(run).clients:
            gains[client.name] = math.inf if client.gain is None else client.gain
        kept = sorted(drawn, key=lambda curves: gains[curves.client])[:MAX_PANELS]
        drawn = [curves for curves in drawn if curves in kept]
    return tuple(drawn)


def share_curves(run: Run) -> tuple[Curve, ...]:
    """Return each client's generalist share in training, mean over blocks, by round.

    Clients without a router have none.
    """
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in run.clients}
    for line in run.train:
        share = mean(line.generalist_share_by_layer or ())
        if share is not None:
            points[line.client].append((float(line.round), share))
    return tuple(Curve(name, tuple(of)) for name, of in points.items() if of)


def drift_points(run: Run) -> Points:
    """Return the drift of the generalists by round; there is none where nothing is shared."""
    return tuple((float(end.round), end.drift) for end in run.ends if end.drift is not None)


def _loss(run: Run, name: str) -> LossCurves:
    # A step is drawn where it ended within its round, and the mean of a round at its middle.
    by_step: list[tuple[float, float]] = []
    by_round: list[tuple[float, float]] = []
    for line in run.train:
        if line.client != name:
            continue
        steps = line.train_nats_per_token_by_step
        for number, nats in enumerate(steps, start=1):
            by_step.append((line.round - 1 + number / len(steps), nats))
        if line.train_nats_per_token is not None:
            by_round.append((line.round - 0.5, line.train_nats_per_token))

    # Only valid is measured round by round; the base's loss on it is one number.
    valid: list[tuple[float, float]] = []
    base: float | None = None
    for measured in run.evaluations:
        if measured.client != name or measured.split != "valid":
            continue
        if measured.model == "base":
            base = measured.nats_per_token
        elif measured.nats_per_token is not None:
            valid.append((float(measured.round), measured.nats_per_token))
    return LossCurves(name, _thinned(by_step), tuple(by_round), tuple(valid), base)


def _thinned(points: Sequence[tuple[float, float]]) -> Points:
    """Return at most MAX_STEP_POINTS points, each the mean of a bin."""
    width = math.ceil(len(points) / MAX_STEP_POINTS) or 1
    means = []
    for start in range(0, len(points), width):
        xs, ys = zip(*points[start : start + width], strict=True)
        means.append((sum(xs) / len(xs), sum(ys) / len(ys)))
    return tuple(means)
