"""This module says what the configs of runs have in common and where they differ, in words."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from comigs.config import Config, dotted
from comigs.experiments.run_data import RunData

Fields = Mapping[str, Any]  # dotted name -> value
SAME = (  # how a run is made, which changes no result
    "base.attention",
    "base.device",
    "base.memory",
    "base.recompute",
    "base.threads",
    "client.micro_batch_size",
    "conditions.machine",
    "evaluation.every",
    "evaluation.splits",
    "evaluation.batch_size",
    "workers",
)
NAMES = ("version", "name", "seed", "data.root", "data.cache", "track")
DATA = (
    "base.name",
    "data.distribution",
    "data.sequence_length",
    "data.valid_fraction",
    "data.test_fraction",
)


def fields_of(config: Config) -> Fields:
    """Return every field that makes a setting, by its dotted name: not seed, text, base or where
    things lie.
    """
    tree = config.model_dump(mode="json")
    clients = {}
    for client in tree["clients"]:
        clients[client["name"]] = {k: v for k, v in client.items() if k not in ("name", "text")}
    flat = dotted(tree | {"clients": clients})
    return {name: value for name, value in flat if not _of(name, (*SAME, *NAMES, *DATA))}


def taken_as_equal(runs: Iterable[RunData]) -> dict[str, list[str]]:
    """Return the fields in which runs differ though they count as the same setting: name -> the
    values, in words.
    """
    flat = in_words([dict(dotted(run.config.model_dump(mode="json"))) for run in runs])
    values = {name: list(flat[name].unique()) for name in flat if _of(name, SAME)}
    return {name: known for name, known in values.items() if len(known) > 1}


def varying(table: pd.DataFrame, groups: Sequence[Hashable]) -> list[str]:
    """Return the columns that differ within at least one group of rows, in the table's order."""
    kinds = table.groupby(list(groups), sort=False).nunique()
    return [name for name in table if kinds[name].max() > 1]


def words(value: Any) -> str:
    """Return a field's value as people write it."""
    if value is None:
        return "none"
    if isinstance(value, str):
        return " ".join(value.split())
    return repr(value).removesuffix(".0") if isinstance(value, float) else json.dumps(value)


def in_words(rows: Sequence[Fields]) -> pd.DataFrame:
    """Return fields in words, a row for each of `rows`; a field that a row lacks is "none"."""
    said = [dict(zip(row, map(words, row.values()), strict=True)) for row in rows]
    return pd.DataFrame(said, index=range(len(rows)), dtype=object).fillna("none")


def _of(name: str, fields: Sequence[str]) -> bool:
    """Return whether a field is one of `fields` or in one of these sections."""
    return any(name == f or name.startswith(f"{f}.") for f in fields)
