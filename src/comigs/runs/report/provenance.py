"""What a run was made with, for its page: settings, versions and machine, and text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comigs import text as f
from comigs.config import dotted
from comigs.runs.report.read import Run
from comigs.text import Table


def settings(run: Run) -> tuple[tuple[str, str], ...]:
    """Return the settings that people ask for first, as (name, value)."""
    config = run.config
    client, merge, wanted = config.client, config.upload.merge, config.participation
    shown = [("method", config.method)]
    shown += [(f"options.{name}", str(value)) for name, value in config.options.items()]

    # What is as usual, or not known yet, would only be in the way.
    if run.summary and run.summary.weights:
        shown.append(("weight of a client", run.summary.weights))
    if merge != "mean":
        shown.append(("upload.merge", merge))
    if wanted.clients_per_round:
        asked = f"{wanted.clients_per_round} of {len(config.clients)}"
        shown.append(("clients in a round", asked))
    rounds = run.summary.rounds if run.summary else config.rounds
    steps = f"{client.steps} a round, {client.steps * rounds} in all"
    router_steps = f"{client.router_steps} after every {client.router_every} local steps"
    shown += [
        ("base", config.base.name),
        ("rounds", str(rounds)),
        ("local steps", steps),
        ("batch", f"{client.batch_size} windows of {config.data.sequence_length} tokens"),
        ("experts per token", str(config.experts.top_k)),
        ("router steps", router_steps),
        ("seed", str(config.seed)),
    ]
    return tuple(shown)


def environment_table(run: Run) -> Table:
    """Return versions, commit and machine, and whatever env.json holds beside the data.

    Nested names are joined by dots.
    """
    others = dict(run.environment)
    if data_table(run) is not None:
        del others["data"]
    rows = tuple((name, _words(value)) for name, value in dotted(others))
    return Table(("what", "value"), rows, names=2)


def data_table(run: Run) -> Table | None:
    """Return how much text each client has in each split, and its fingerprint.

    It is None where env.json does not say, as in a federation.
    """
    # env.json is shown as far as it is understood: no figure of the page depends on it.
    data = run.environment.get("data")
    if not isinstance(data, Mapping):
        return None
    rows = []
    for client, splits in data.items():
        if not isinstance(splits, Mapping):
            continue
        for split, facts in splits.items():
            if isinstance(facts, Mapping):
                amounts = [_count(facts.get(name)) for name in ("tokens", "bytes", "documents")]
                fingerprint = _words(facts.get("sha256"))
                rows.append((str(client), str(split), *amounts, fingerprint))
    if not rows:
        return None
    headers = ("client", "split", "tokens", "bytes", "documents", "sha256")
    return Table(headers, tuple(rows), names=2)


def _count(value: Any) -> str:
    return f.count(value) if isinstance(value, int) else f.NONE


def _words(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f.NONE if value is None else str(value)
