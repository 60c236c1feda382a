"""The result of a run from its metrics: summary.json."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from comigs.config import Config
from comigs.methods.method import Method

FIGURES = ("nats_per_token", "perplexity", "bits_per_byte", "tokens")


def summarize(config: Config, method: Method, metrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The content of summary.json (docs/run-folder.md). metrics: all lines of a finished run."""
    clients = {}
    by_client = defaultdict[str, list[dict[str, Any]]](list)
    for line in metrics:
        if line["kind"] in ("train", "evaluation", "download"):
            by_client[line["client"]].append(line)
    for entry in config.clients:
        own = by_client[entry.name]
        test = [line for line in own if line["kind"] == "evaluation" and line["split"] == "test"]
        personal = [x for x in test if x["model"] == "personal" and x["round"] == config.rounds]
        trained = [line for line in own if line["kind"] == "train"]
        shape = method.shape(config.shape_of(entry))
        clients[entry.name] = {
            "test": _figures(personal),
            "base_test": _figures([line for line in test if line["model"] == "base"]),
            "uploaded_bytes": sum(line["uploaded_bytes"] for line in trained),
            "downloaded_bytes": sum(line.get("downloaded_bytes", 0) for line in own),
            "trained_parameters": max((line["trained_parameters"] for line in trained), default=0),
            "generalists": shape.generalists,
            "specialists": shape.specialists,
            "rank": shape.rank,
            "specialist_rank": shape.specialist_rank,
        }
    measured = [c for c in clients.values() if c["test"] and c["base_test"]]
    return {
        "method": method.name,
        "weights": method.weights,
        "base": config.base.name,
        "seed": config.seed,
        "rounds": config.rounds,
        "clients": clients,
        "mean": {
            "clients": len(measured),
            "test": _mean([c["test"] for c in measured]),
            "base_test": _mean([c["base_test"] for c in measured]),
        },
    }


def _figures(lines: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Of the last of them; None where a client is gone and nothing was measured."""
    return {name: lines[-1][name] for name in FIGURES} if lines else None


def _mean(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over clients, each client counting once."""
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in FIGURES if name != "tokens"}
    return mean | {"perplexity_of_mean": math.exp(min(mean["nats_per_token"], 700))}
