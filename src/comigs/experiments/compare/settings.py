"""Which runs belong together: runs on the same text are a dataset, runs that differ only in their
seed a setting.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from comigs.config import SPLITS, Config, Split, dotted
from comigs.errors import UserError
from comigs.experiments.compare.discover import Found
from comigs.runs.report.read import Run

Fields = Mapping[str, Any]  # dotted name -> value
_SAME = (
    "base.attention",
    "base.device",
    "base.threads",
    "client.micro_batch_size",
    "evaluation",
    "workers",
)  # how
_NAMES = ("version", "name", "seed", "data.root", "data.cache")
_DATA = (
    "base.name",
    "data.distribution",
    "data.sequence_length",
    "data.valid_fraction",
    "data.test_fraction",
)
_NOUNS = {"base.name": ""}  # speaks for itself


@dataclass(frozen=True)
class Setting:
    """Runs that differ in nothing but their seed.

    fields: what its config says where the comparison's runs differ. place: its value on each axis
    that tells settings apart, in words: the sweep's axes, else those fields.
    """

    name: str
    method: str
    fields: Fields
    place: Mapping[str, str]
    runs: Mapping[int, Run]  # by seed


@dataclass(frozen=True)
class Dataset:
    """Settings that were trained and measured on the same text, base and windows, so that their
    figures compare.
    """

    name: str
    settings: tuple[Setting, ...]

    @property
    def runs(self) -> list[Run]:
        """All runs of all settings."""
        return [run for setting in self.settings for run in setting.runs.values()]


@dataclass
class _Group:
    """The runs of one setting while its name is not known yet."""

    fields: Fields
    found: list[Found] = field(default_factory=list)

    @property
    def place(self) -> Fields:
        return self.found[0].place or {}

    @property
    def config(self) -> Config:
        return self.found[0].run.config


def group(found: Sequence[Found]) -> tuple[Dataset, ...]:
    """Finished runs into datasets and settings. Raises UserError for two runs of the same setting
    and seed.
    """
    by_data: list[tuple[_Data, dict[Hashable, _Group]]] = []
    placed = (
        all(f.place is not None for f in found) and len({tuple(f.place or ()) for f in found}) == 1
    )
    for f in found:
        fields = fields_of(f.run.config)
        own = tuple((f.place or {}).values()) if placed else ()
        data = data_of(f.run)
        groups = next((groups for known, groups in by_data if known.joined_by(data)), None)
        if groups is None:
            groups = {}
            by_data.append((data, groups))
        groups.setdefault((own, json.dumps(fields, sort_keys=True)), _Group(fields)).found.append(f)
    datasets = [list(groups.values()) for _, groups in by_data]
    differing = varying([[g.fields for g in groups] for groups in datasets])
    axes = varying([[g.place for g in groups] for groups in datasets]) if placed else []
    names = _setting_names(datasets, differing, axes, placed)
    titles = _dataset_names(datasets, placed)
    return tuple(
        Dataset(
            title,
            tuple(
                _setting(g, names[id(g)], differing, axes)
                for g in _sorted(groups, differing, placed)
            ),
        )
        for title, groups in zip(titles, datasets, strict=True)
    )


def fields_of(config: Config) -> Fields:
    """Every field that makes a setting, by its dotted name: not seed, text, base or where things
    lie.
    """
    tree = config.model_dump(mode="json")
    tree["clients"] = {
        c["name"]: {k: v for k, v in c.items() if k not in ("name", "text")}
        for c in tree["clients"]
    }
    flat = dict(dotted(tree))
    return {name: value for name, value in flat.items() if not _of(name, (*_SAME, *_NAMES, *_DATA))}


@dataclass
class _Data:
    """What must be equal for figures to be comparable.

    measured: base, clients, test text, length of windows. learnt: split -> the text that is learnt
    from, of splits that are used whole: a run that uses a share of it (data.train_share) is another
    setting on the same data.
    """

    measured: str
    learnt: dict[Split, str]

    def joined_by(self, other: _Data) -> bool:
        """Whether the other's run belongs here; remembers what it says of the text."""
        both = self.learnt.keys() & other.learnt.keys()
        if self.measured != other.measured or any(self.learnt[s] != other.learnt[s] for s in both):
            return False
        self.learnt |= other.learnt
        return True


def data_of(run: Run) -> _Data:
    """The text, base and windows of a run; from its config where env.json does not say."""
    config, environment = run.config, run.environment
    texts = text_of(run)
    of = {
        split: json.dumps({name: own.get(split) for name, own in texts.items()}, sort_keys=True)
        for split in SPLITS
    }
    fingerprint = environment.get("base_fingerprint", config.base.name)
    measured = [fingerprint, of["test"], config.data.distribution, config.data.sequence_length]
    whole: dict[Split, bool] = {
        "train": config.data.train_share == 1,
        "valid": config.data.valid_share == 1,
    }
    return _Data(
        json.dumps(measured), {split: of[split] for split, is_whole in whole.items() if is_whole}
    )


def text_of(run: Run) -> dict[str, dict[str, Any]]:
    """Client -> split -> what env.json says of its text, or the config where that says nothing.

    Not how many tokens it has, which not every run knows.
    """
    data = run.environment.get("data")
    if not isinstance(data, Mapping) or not data:
        entries = {c.name: c.model_dump(mode="json", include={"text"}) for c in run.config.clients}
        return {name: dict.fromkeys(SPLITS, entry) for name, entry in entries.items()}
    return {
        client: {
            split: {k: v for k, v in facts.items() if k != "tokens"} for split, facts in own.items()
        }
        for client, own in data.items()
    }


def taken_as_equal(runs: Iterable[Run]) -> dict[str, list[str]]:
    """Fields in which runs differ though they count as the same setting: name -> the values, in
    words.
    """
    flat = [dict(dotted(run.config.model_dump(mode="json"))) for run in runs]
    names = dict.fromkeys(name for one in flat for name in one if _of(name, _SAME))
    values = {name: list(dict.fromkeys(words(one.get(name)) for one in flat)) for name in names}
    return {name: known for name, known in values.items() if len(known) > 1}


def varying(groups: Sequence[Sequence[Fields]]) -> list[str]:
    """Names of the fields that differ within at least one group, in order of appearance."""
    names = dict.fromkeys(name for members in groups for fields in members for name in fields)
    return [
        n
        for n in names
        if any(len({words(fields.get(n)) for fields in members}) > 1 for members in groups)
    ]


def words(value: Any) -> str:
    """A field's value as people write it."""
    if value is None:
        return "none"
    if isinstance(value, str):
        return " ".join(value.split())
    return repr(value).removesuffix(".0") if isinstance(value, float) else json.dumps(value)


def _setting(g: _Group, name: str, differing: Sequence[str], axes: Sequence[str]) -> Setting:
    runs: dict[int, Run] = {}
    for f in g.found:
        seed = f.run.config.seed
        if seed in runs:
            raise UserError(
                f"{runs[seed].folder} and {f.run.folder}: the same setting ({name}) with the same seed, {seed}; "
                "leave one out"
            )
        runs[seed] = f.run
    fields = {n: g.fields.get(n) for n in differing}
    place = (
        {axis: g.place[axis] for axis in axes}
        if axes
        else {n: words(value) for n, value in fields.items()}
    )
    return Setting(name, g.config.method, fields, place, dict(sorted(runs.items())))


def _setting_names(
    datasets: Sequence[Sequence[_Group]],
    differing: Sequence[str],
    axes: Sequence[str],
    placed: bool,
) -> dict[int, str]:
    """By a group's id: the sweep's words for it, else its method; and what sets it apart from
    others so called.
    """
    every = [g for groups in datasets for g in groups]
    with_method = placed or "method" in differing
    first = {
        id(g): ", ".join(g.place[a] for a in axes) or (g.config.method if with_method else "")
        for g in every
    }
    names = {}
    for g in every:
        alike = [[h for h in groups if first[id(h)] == first[id(g)]] for groups in datasets]
        apart = varying([[h.fields for h in members] for members in alike])
        if len(apart) > 1:  # what is as always need not be said
            usual = fields_of(Config(clients=g.config.clients))
            apart = [n for n in apart if words(g.fields.get(n)) != words(usual.get(n))]
        names[id(g)] = ", ".join(
            filter(None, [first[id(g)], *(_short(n, differing, g) for n in apart)])
        )
        names[id(g)] = names[id(g)] or g.config.method
    return names


def _short(name: str, all_names: Sequence[str], g: _Group) -> str:
    """rank=8; with the section where another section's field has the same name."""
    last = name.rpartition(".")[2]
    unique = sum(n.rpartition(".")[2] == last for n in all_names) == 1
    return f"{last if unique else name}={words(g.fields.get(name))}"


def _dataset_names(datasets: Sequence[Sequence[_Group]], placed: bool) -> list[str]:
    """The sweep's words for them, else the runs' name, and whatever of _DATA sets datasets of one
    name apart.
    """
    places = [groups[0].place for groups in datasets]
    inside = varying([[g.place for g in groups] for groups in datasets])
    fixed = [axis for axis in places[0] if axis not in inside] if placed else []
    apart = [
        axis for axis in fixed if len(datasets) == 1 or len({place[axis] for place in places}) > 1
    ]
    names = [", ".join(place[axis] for axis in apart) for place in places]
    if not all(names):
        names = [groups[0].config.name for groups in datasets]
    flat = [dict(dotted(groups[0].config.model_dump(mode="json"))) for groups in datasets]
    alike = {
        name: [fields for n, fields in zip(names, flat, strict=True) if n == name] for name in names
    }
    differ = {
        name: [n for n in varying([members]) if n in _DATA] for name, members in alike.items()
    }
    names = [
        ", ".join(
            [
                name,
                *(
                    f"{_NOUNS.get(n, n.rpartition('.')[2] + '=')}{words(fields[n])}"
                    for n in differ[name]
                ),
            ]
        )
        for name, fields in zip(names, flat, strict=True)
    ]
    return [
        f"{n} ({names[:i].count(n) + 1})" if names.count(n) > 1 else n for i, n in enumerate(names)
    ]


def _sorted(groups: Sequence[_Group], differing: Sequence[str], placed: bool) -> Sequence[_Group]:
    """A sweep's own order; else by method as found, then by the values, numbers by size."""
    if placed:
        return groups
    methods = list(dict.fromkeys(g.config.method for g in groups))

    def key(g: _Group) -> tuple[Any, ...]:
        values = [g.fields.get(name) for name in differing if name != "method"]
        numbers = [(0, v, "") if isinstance(v, int | float) else (1, 0, words(v)) for v in values]
        return (methods.index(g.config.method), *numbers)

    return sorted(groups, key=key)


def _of(name: str, fields: Sequence[str]) -> bool:
    return any(name == f or name.startswith(f"{f}.") for f in fields)
