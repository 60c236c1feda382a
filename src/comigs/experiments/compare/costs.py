"""This module says what a setting costs beside its quality: parameters, tokens, bytes, speed and
memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import pandas as pd

from comigs.experiments.compare.settings import Setting
from comigs.experiments.compare.simulated import simulated_costs

Costs = dict[str, Any]  # a cell by its column in table.csv


def costs(setting: Setting, own: pd.DataFrame) -> Costs:
    """Return the costs of all runs of a setting, per client; None: not recorded. own: a row for
    each client of each run.

    trained_parameters is of the training_clients that train any (one model for all is trained by
    one of `clients`); tokens and bytes count every client. Tokens are of the whole run, those of
    router steps apart. tokens_per_second depends on the machine; peak_memory_bytes is the most
    seen. weights: how much each client counts in the server's merge, in words. simulated_seconds,
    work_lost: of runs with simulated devices.
    """
    runs = list(setting.runs.values())
    rounds = max(1, runs[0].config.rounds)
    # One model for all is trained by one client; the others' zeros are no parameters.
    parameters = own["trained_parameters"].dropna().tolist()
    trained = [p for p in parameters if p > 0]
    # Speed is of client and round; the server's own rows have none.
    lines = [row for run in runs for row in run.rounds if row["client"] is not None]
    speeds = [speed for row in lines if (speed := row.get("tokens_per_second"))]
    return {
        **_range("trained_parameters", trained or parameters),
        "trained_parameters_ratio": None,
        "training_clients": len(trained) / len(runs),
        "clients": len(own) // len(runs),
        "trained_tokens": sum(own["trained_tokens"]) / len(own),
        "trained_tokens_ratio": None,
        "router_tokens": sum(own["router_tokens"]) / len(own),
        **_range("uploaded_bytes_per_round", [b / rounds for b in own["uploaded_bytes"]]),
        **_range("downloaded_bytes_per_round", [b / rounds for b in own["downloaded_bytes"]]),
        "tokens_per_second": fmean(speeds) if speeds else None,
        "peak_memory_bytes": max(own["peak_memory_bytes"].dropna(), default=None),
        "weights": own["weights"].iloc[0],
        **simulated_costs(setting),
    }


def with_ratios(own: Costs, baseline: Costs) -> Costs:
    """Return costs with how many times the baseline's trained parameters and tokens they are; None
    where either is unknown or the baseline has none.
    """
    ratios = {}
    for name in ("trained_parameters", "trained_tokens"):
        if own[name] is not None and baseline[name]:
            ratios[f"{name}_ratio"] = own[name] / baseline[name]
    return own | ratios


def _range(name: str, values: Sequence[float]) -> Costs:
    """Return the mean over clients and seeds, and the least and the most."""
    if not values:
        return {name: None}
    return {name: fmean(values), f"{name}_min": min(values), f"{name}_max": max(values)}
