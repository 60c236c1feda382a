"""This module says which runs belong together: runs on the same text are a dataset, and runs that
differ only in their seed are a setting.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from comigs.config import SPLITS, Config, Split, dotted
from comigs.errors import UserError
from comigs.experiments.compare.discover import Found
from comigs.experiments.compare.fields import DATA, Fields, fields_of, in_words, varying, words
from comigs.experiments.run_data import RunData

LONGEST = 3  # fields of a config that a name says


@dataclass(frozen=True)
class Setting:
    """A setting is runs that differ in nothing but their seed.

    fields: what its config says where the comparison's runs differ. place: its value on each axis
    that tells settings apart, in words: the sweep's axes, else those fields.
    """

    name: str
    method: str
    fields: Fields
    place: Mapping[str, str]
    runs: Mapping[int, RunData]  # by seed

    @property
    def config(self) -> Config:
        """The config of its first run."""
        return next(iter(self.runs.values())).config


@dataclass(frozen=True)
class Dataset:
    """A dataset is settings that were trained and measured on the same text, base and windows, so
    that their figures compare.
    """

    name: str
    settings: tuple[Setting, ...]

    @property
    def runs(self) -> list[RunData]:
        """All runs of all settings."""
        return [run for setting in self.settings for run in setting.runs.values()]


@dataclass(eq=False)
class _Group:
    """The runs of one setting while its name is not known yet. dataset: the dataset's number."""

    dataset: int
    fields: Fields
    found: list[Found] = field(default_factory=list)

    @property
    def place(self) -> Fields:
        """Its value on each axis of the sweep."""
        return self.found[0].place or {}

    @property
    def config(self) -> Config:
        """The config of its first run."""
        return self.found[0].run.config


def group(found: Sequence[Found]) -> tuple[Dataset, ...]:
    """Return finished runs as datasets of settings. Raises UserError for two runs of the same
    setting and seed.
    """
    # A sweep's words name things only where every run has its place on the same axes.
    axes_of = {tuple(one.place or ()) for one in found}
    placed = len(axes_of) == 1 and all(one.place is not None for one in found)
    if not placed:
        found = [Found(one.run) for one in found]
    groups = _groups(found)
    by_dataset: list[list[_Group]] = [[] for _ in range(groups[-1].dataset + 1)]
    for g in groups:
        by_dataset[g.dataset].append(g)

    # Settings differ within a dataset; what differs between datasets only is the dataset's.
    home = [g.dataset for g in groups]
    fields = in_words([g.fields for g in groups])
    places = in_words([g.place for g in groups])
    differing, axes = varying(fields, home), varying(places, home)
    names = _setting_names(groups, fields, places[axes], placed or "method" in differing)
    titles = _dataset_names(by_dataset, places.drop(columns=axes))

    datasets = []
    for title, members in zip(titles, by_dataset, strict=True):
        ordered = members if placed else _sorted(members, differing)
        settings = [_setting(g, names[groups.index(g)], differing, axes) for g in ordered]
        datasets.append(Dataset(title, tuple(settings)))
    return tuple(datasets)


def text_of(run: RunData) -> dict[str, dict[str, Any]]:
    """Return client -> split -> what env.json says of its text, or the config where that says
    nothing; without the number of its tokens, which not every run knows.
    """
    data = run.environment.get("data")
    texts: dict[str, dict[str, Any]] = {}
    if not isinstance(data, Mapping) or not data:
        for client in run.config.clients:
            entry = client.model_dump(mode="json", include={"text"})
            texts[client.name] = dict.fromkeys(SPLITS, entry)
        return texts
    for name, own in data.items():
        texts[name] = {}
        for split, facts in own.items():
            texts[name][split] = {k: v for k, v in facts.items() if k != "tokens"}
    return texts


class _Data:
    """What must be equal for the figures of runs to be comparable.

    measured: base, clients, test text, length of windows. learnt: split -> the text that is learnt
    from, of splits that are used whole: a run that uses a share of it (data.train_share) is another
    setting on the same data.
    """

    def __init__(self, run: RunData) -> None:
        config, texts = run.config, text_of(run)
        of = {}
        for split in SPLITS:
            own = {name: text.get(split) for name, text in texts.items()}
            of[split] = json.dumps(own, sort_keys=True)
        base = run.environment.get("base_fingerprint", config.base.name)
        windows = [config.data.distribution, config.data.sequence_length]
        self.measured = json.dumps([base, of["test"], *windows])
        self.learnt: dict[Split, str] = {}
        if config.data.train_share == 1:
            self.learnt["train"] = of["train"]
        if config.data.valid_share == 1:
            self.learnt["valid"] = of["valid"]

    def joined_by(self, other: _Data) -> bool:
        """Return whether the other's run belongs here, and then remember what it says of the
        text.
        """
        both = self.learnt.keys() & other.learnt.keys()
        if self.measured != other.measured or any(self.learnt[s] != other.learnt[s] for s in both):
            return False
        self.learnt |= other.learnt
        return True


def _groups(found: Sequence[Found]) -> list[_Group]:
    """Return the runs of each setting, dataset by dataset. A sweep's axes tell settings apart,
    too.
    """
    known: list[_Data] = []
    groups: dict[Hashable, _Group] = {}
    for one in found:
        # The first dataset that the run fits into is its own.
        data = _Data(one.run)
        number = next((n for n, kind in enumerate(known) if kind.joined_by(data)), len(known))
        if number == len(known):
            known.append(data)
        fields = fields_of(one.run.config)
        # Values that read the same are the same.
        said = {name: words(value) for name, value in fields.items()}
        key = number, *(one.place or {}).values(), json.dumps(said, sort_keys=True)
        groups.setdefault(key, _Group(number, fields)).found.append(one)
    return sorted(groups.values(), key=lambda g: g.dataset)


def _setting(g: _Group, name: str, differing: Sequence[str], axes: Sequence[str]) -> Setting:
    """Return a group as a setting. Raises UserError where it has two runs of one seed."""
    runs: dict[int, RunData] = {}
    for one in g.found:
        seed = one.run.config.seed
        if seed in runs:
            raise UserError(
                f"{runs[seed].folder} and {one.run.folder}: the same setting ({name}) "
                f"with the same seed, {seed}; leave one out"
            )
        runs[seed] = one.run
    fields = {n: g.fields.get(n) for n in differing}
    place = {axis: g.place[axis] for axis in axes}
    if not axes:
        place = {n: words(value) for n, value in fields.items()}
    return Setting(name, g.config.method, fields, place, dict(sorted(runs.items())))


def _setting_names(
    groups: Sequence[_Group], fields: pd.DataFrame, places: pd.DataFrame, with_method: bool
) -> list[str]:
    """Return a name for each group: the sweep's words for it, else its method, and what sets it
    apart from others so called.
    """
    differing = varying(fields, [g.dataset for g in groups])
    short = [name.rpartition(".")[2] for name in differing]
    first = []
    for g, own in zip(groups, places.to_numpy(), strict=True):
        first.append(", ".join(own) or (g.config.method if with_method else ""))

    names = []
    for number, g in enumerate(groups):
        alike = [n for n, other in enumerate(first) if other == first[number]]
        apart = varying(fields.loc[alike], [groups[n].dataset for n in alike])
        # What is as always need not be said.
        if len(apart) > 1:
            usual = fields_of(Config(clients=g.config.clients))
            apart = [n for n in apart if fields.at[number, n] != words(usual.get(n))]
        # A long name says what it takes to know a setting; the table of settings says all.
        enough = _enough(fields.loc[alike, apart]) if len(apart) > LONGEST else apart
        parts = [first[number]]
        for name in enough:
            # Fields of two sections may have one name.
            last = name.rpartition(".")[2]
            shown = last if short.count(last) == 1 else name
            parts.append(f"{shown}={fields.at[number, name]}")
        if len(enough) < len(apart):
            parts.append("…")
        names.append(", ".join(filter(None, parts)) or g.config.method)
    return names


def _enough(fields: pd.DataFrame) -> list[str]:
    """Return the first columns that tell all rows apart that the whole table does."""
    kinds = len(fields.drop_duplicates())
    columns = list(fields)
    number = 1
    while len(fields[columns[:number]].drop_duplicates()) < kinds:
        number += 1
    return columns[:number]


def _dataset_names(datasets: Sequence[Sequence[_Group]], places: pd.DataFrame) -> list[str]:
    """Return the sweep's words for datasets, else the runs' name, and whatever of DATA sets
    datasets of one name apart. places: a group's value on each axis that no dataset is told apart
    by inside.
    """
    firsts = [members[0] for members in datasets]
    order = [g for members in datasets for g in members]
    own = places.loc[[order.index(g) for g in firsts]]
    if len(datasets) > 1:
        own = own[varying(own, [0] * len(own))]
    names = [", ".join(row) for row in own.to_numpy()]
    if not all(names):
        names = [g.config.name for g in firsts]

    # Two datasets of one name differ in their data, or get a number.
    flat = in_words([dict(dotted(g.config.model_dump(mode="json"))) for g in firsts])
    titles: list[str] = []
    for number, name in enumerate(names):
        alike = [n for n, other in enumerate(names) if other == name]
        parts = [name]
        for apart in varying(flat.loc[alike], [0] * len(alike)):
            if apart in DATA:
                # The name of a base speaks for itself.
                noun = "" if apart == "base.name" else f"{apart.rpartition('.')[2]}="
                parts.append(f"{noun}{flat.at[number, apart]}")
        titles.append(", ".join(parts))
    counts = Counter(titles)
    numbered = []
    for n, title in enumerate(titles):
        again = f" ({titles[:n].count(title) + 1})"
        numbered.append(title + again * (counts[title] > 1))
    return numbered


def _sorted(groups: Sequence[_Group], differing: Sequence[str]) -> list[_Group]:
    """Return the settings of a dataset by method as found, then by their values, numbers by
    size.
    """
    methods = list(dict.fromkeys(g.config.method for g in groups))

    def key(g: _Group) -> tuple[Any, ...]:
        numbers: list[tuple[int, float, str]] = []
        for value in [g.fields.get(name) for name in differing if name != "method"]:
            if isinstance(value, int | float):
                numbers.append((0, value, ""))
            else:
                numbers.append((1, 0, words(value)))
        return (methods.index(g.config.method), *numbers)

    return sorted(groups, key=key)
