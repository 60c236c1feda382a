"""This module says what a setting costs beside its quality: parameters, tokens, bytes, speed and
memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import pandas as pd

from comigs.experiments.compare.settings import Setting


@dataclass(frozen=True)
class Range:
    """The mean over clients and seeds, and the least and the most."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Costs:
    """Costs are per client; None: not recorded. Bytes are per round, tokens of the whole run.

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


def ratios(own: Costs, other: Costs | None) -> tuple[float | None, float | None]:
    """Return how many times the baseline's trained parameters and trained tokens a setting has;
    None where either is unknown or the baseline has none.
    """
    parameters = tokens = None
    if other and own.parameters is not None and other.parameters:
        parameters = own.parameters / other.parameters
    if other and other.trained_tokens:
        tokens = own.trained_tokens / other.trained_tokens
    return parameters, tokens


def costs(setting: Setting, own: pd.DataFrame) -> Costs:
    """Return the costs of all runs of a setting. own: a row for each client of each of them."""
    runs = list(setting.runs.values())
    rounds = max(1, runs[0].config.rounds)
    # One model for all is trained by one client; the others' zeros are no parameters.
    parameters = own["trained_parameters"].dropna().tolist()
    trained = [p for p in parameters if p > 0]
    # Speed is of client and round; the server's own rows have none.
    lines = [row for run in runs for row in run.rounds if row["client"] is not None]
    speeds = [speed for row in lines if (speed := row.get("tokens_per_second"))]
    return Costs(
        trained_parameters=_range(trained or parameters),
        training=len(trained) // len(runs),
        clients=len(own) // len(runs),
        trained_tokens=sum(own["trained_tokens"]) / len(own),
        router_tokens=sum(own["router_tokens"]) / len(own),
        uploaded=_range([b / rounds for b in own["uploaded_bytes"]]) or Range(0, 0, 0),
        downloaded=_range([b / rounds for b in own["downloaded_bytes"]]) or Range(0, 0, 0),
        tokens_per_second=fmean(speeds) if speeds else None,
        peak_memory_bytes=max(own["peak_memory_bytes"].dropna(), default=None),
        weights=own["weights"].iloc[0],
    )


def _range(values: Sequence[float]) -> Range | None:
    """Return the mean, the least and the most, and None where there is no value."""
    return Range(fmean(values), min(values), max(values)) if values else None
