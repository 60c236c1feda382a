"""What a setting costs beside its quality: parameters, tokens, bytes, speed, memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from comigs.experiments.compare.settings import Setting
from comigs.runs.report.read import ClientSummary


@dataclass(frozen=True)
class Range:
    """Mean over clients and seeds, and the least and the most."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Costs:
    """Per client; None: not recorded. Bytes are per round, tokens of the whole run.

    trained_parameters is of the `training` clients that train any (one model for all is trained by
    one of `clients`); tokens and bytes count every client. router_tokens: those of router steps,
    beside the experts'. tokens_per_second depends on the machine; peak_memory_bytes is the most
    seen. weights: how much each client counts in the server's merge, in words.
    """

    trained_parameters: Range | None
    training: int
    clients: int
    trained_tokens: float
    router_tokens: float
    uploaded: Range
    downloaded: Range
    tokens_per_second: float | None
    peak_memory_bytes: float | None
    weights: str | None

    @property
    def parameters(self) -> float | None:
        """Mean of trained_parameters."""
        return self.trained_parameters.mean if self.trained_parameters else None


def ratio(value: float | None, reference: float | None) -> float | None:
    """How many times the reference; None where either is unknown or the reference is 0."""
    return value / reference if value is not None and reference else None


def costs(setting: Setting) -> Costs:
    """Of all runs of a setting."""
    runs = list(setting.runs.values())
    clients = [c for run in runs if run.summary for c in run.summary.clients.values()]
    parameters = [c.trained_parameters for c in clients if c.trained_parameters is not None]
    timings = [t for run in runs for t in run.timings if t.client is not None]
    speeds = [t.tokens_per_second for t in timings if t.tokens_per_second]
    memory = [t.peak_memory_bytes for t in timings if t.peak_memory_bytes is not None]
    rounds = max(1, runs[0].config.rounds)
    train = [line for run in runs for line in run.train]
    return Costs(
        trained_parameters=_range([p for p in parameters if p] or parameters),
        training=sum(p > 0 for p in parameters) // len(runs),
        clients=len(clients) // len(runs),
        trained_tokens=sum(t.trained_tokens for t in train) / len(clients),
        router_tokens=sum(t.router_tokens for t in train) / len(clients),
        uploaded=_bytes(clients, "uploaded_bytes", rounds),
        downloaded=_bytes(clients, "downloaded_bytes", rounds),
        tokens_per_second=fmean(speeds) if speeds else None,
        peak_memory_bytes=max(memory, default=None),
        weights=runs[0].summary.weights if runs[0].summary else None,
    )


def _bytes(
    clients: Sequence[ClientSummary],
    which: Literal["uploaded_bytes", "downloaded_bytes"],
    rounds: int,
) -> Range:
    return _range([getattr(c, which) / rounds for c in clients]) or Range(0, 0, 0)


def _range(values: Sequence[float]) -> Range | None:
    return Range(fmean(values), min(values), max(values)) if values else None
