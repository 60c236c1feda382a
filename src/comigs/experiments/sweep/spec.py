"""This module reads, checks and writes the sweep file: axes of named values of config fields."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import tomli_w
from pydantic import Field, ValidationError, field_validator, model_validator

from comigs.config import SPLITS, Section, read_toml, resolve
from comigs.config.errors import one_line
from comigs.errors import UserError, nearest

Fields = dict[str, Any]  # `client.steps` -> value
NAME = r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,63}"  # of an axis or a value: also a folder
LETTERS = "letters, digits, '.', '_', '+', '=' or '-', the first a letter or digit"  # NAME in words


class Sweep(Section):
    """A sweep is the product of all axes and seeds, without what is skipped."""

    name: str = Field(
        description="The sweep is called so, and its folder in `runs`. Default: the name of the "
        "file, without .toml."
    )
    config: str | None = Field(
        None, description="All runs start from this run TOML. None: one axis says from which."
    )
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (42,), description="Each combination runs once with each of these seeds."
    )
    baseline: str | None = Field(
        None,
        description="`comigs compare` compares against this value of an axis. None: against local.",
    )
    set: Fields = Field({}, description="Every run sets these fields of the config, as --set does.")
    axes: dict[str, dict[str, Fields]] = Field(
        {}, description="Each axis has named values, and each value sets fields of the config."
    )
    skip: tuple[dict[str, str], ...] = Field(
        (), description="These combinations are left out, each {axis = value, ...}."
    )

    @field_validator("name")
    @classmethod
    def _name_is_a_folder_name(cls, value: str) -> str:
        if not re.fullmatch(NAME, value):
            raise ValueError(f"must be {LETTERS}")
        return value

    @field_validator("set")
    @classmethod
    def _flat_set(cls, value: Fields) -> Fields:
        return flat(value)

    @field_validator("axes")
    @classmethod
    def _flat_axes(cls, value: dict[str, dict[str, Fields]]) -> dict[str, dict[str, Fields]]:
        for named in value.values():
            for name, fields in named.items():
                named[name] = flat(fields)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Sweep:
        if not self.seeds:
            raise ValueError("seeds: none; give at least one, as seeds = [42]")
        if len({*self.seeds}) < len(self.seeds):
            raise ValueError(f"seeds: given {list(self.seeds)}; must differ")
        self._check_names()
        self._check_fields()
        self._check_config()
        self._check_baseline()
        for number, entry in enumerate(self.skip):
            self._check_skip(f"skip.{number}", entry)
        return self

    def _check_names(self) -> None:
        for axis, values in self.axes.items():
            if not values:
                raise ValueError(
                    f"axes.{axis}: no values; write at least one, as NAME = {{ method = ... }}"
                )

            # names are folders, and some file systems do not tell A from a
            for name in (axis, *values):
                if not re.fullmatch(NAME, name):
                    raise ValueError(f'axes.{axis}: the name "{name}" is also a folder: {LETTERS}')
            if len({name.lower() for name in values}) < len(values):
                raise ValueError(
                    f"axes.{axis}: two values have the same name; names must differ (case aside)"
                )

    def _values(self) -> Iterator[tuple[str, str, Fields]]:
        """Give each value: the place of its axis, the place of itself, and its fields."""
        for axis, named in self.axes.items():
            for name, fields in named.items():
                yield f"axes.{axis}", f"axes.{axis}.{name}", fields

    def _check_fields(self) -> None:
        for _, where, fields in [("", "set", self.set), *self._values()]:
            if "seed" in fields:
                raise ValueError(f"{where}: seed: write seeds = [42, ...] at the top of the file")
            for key in fields:
                if not re.fullmatch(r"[A-Za-z0-9._-]+", key):
                    raise ValueError(
                        f'{where}: "{key}" is no field of the config; '
                        "write for example client.steps = 20"
                    )

    def _check_config(self) -> None:
        """Refuse a sweep unless every run starts from exactly one run TOML."""
        if "config" in self.set:
            raise ValueError(
                "set.config: write config = ... at the top of the file, "
                "or in each value of one axis"
            )

        # it may be said at the top or by one axis: two places could contradict each other
        places = ["config"] if self.config is not None else []
        for axis, named in self.axes.items():
            if any("config" in fields for fields in named.values()):
                places.append(f"axes.{axis}")
        if not places:
            raise ValueError(
                'config: missing; write config = "quickstart.toml" at the top, '
                "or in each value of one axis"
            )
        if len(places) > 1:
            raise ValueError(f"config: given in {' and in '.join(places)}; must be in one place")

        # an axis that says it must say it in all its values
        for axis, where, fields in self._values():
            given = fields.get("config", "")
            if places == [axis] and not given:
                raise ValueError(
                    f"{where}.config: missing; all values of an axis have one, or none"
                )
            if not isinstance(given, str):
                raise ValueError(f"{where}.config: given {given!r}; must be a path in quotes")

    def _check_baseline(self) -> None:
        if self.baseline is None:
            return

        # a name alone must be enough to find the value
        homes = [axis for axis, values in self.axes.items() if self.baseline in values]
        if len(homes) > 1:
            raise ValueError(
                f'baseline: "{self.baseline}" is a value of {" and of ".join(homes)}; rename one'
            )
        if not homes:
            names = list(chain.from_iterable(self.axes.values()))
            raise ValueError(
                f'baseline: no axis has a value "{self.baseline}".'
                f"{nearest(self.baseline, names)} There are: {', '.join(names)}"
            )

    def _check_skip(self, where: str, entry: Mapping[str, str]) -> None:
        if not entry:
            raise ValueError(
                f"{where}: empty, which would skip everything; write {{ AXIS = VALUE }}"
            )
        for axis, name in entry.items():
            _require_known(where, "axis", axis, list(self.axes))
            _require_known(where, "value", name, list(self.axes[axis]))

    def config_of(self, choice: Mapping[str, str]) -> tuple[str, str]:
        """Return the run TOML of a combination as written, and the place where it is written."""
        for axis, name in choice.items():
            if "config" in self.axes[axis][name]:
                return self.axes[axis][name]["config"], f"axes.{axis}.{name}.config"
        assert self.config is not None
        return self.config, "config"

    def layers(self, choice: Mapping[str, str], seed: int) -> dict[str, list[str]]:
        """Return a run's `key=value` overrides by where they are written, in their order."""
        layers = {"set": _overrides(self.set)}
        for axis, name in choice.items():
            layers[f"axes.{axis}.{name}"] = _overrides(self.axes[axis][name])
        layers["seeds"] = [f"seed={seed}"]
        return layers


def read_sweep(path: Path) -> Sweep:
    """Return the sweep of a file.

    Raises UserError with one line for whatever is wrong with the file itself; `plan` checks the
    runs.
    """
    tree = {"name": path.stem, **read_toml(path, "sweep")}
    try:
        return Sweep.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{path}: {one_line(error, tree, {'': Sweep})}") from None


def to_toml(sweep: Sweep, source: Path, folder: Path) -> str:
    """Write the sweep of the file `source` as TOML for a file in `folder`.

    The paths of run TOMLs are made relative to `folder`, so that they mean the same files.
    """
    tree = sweep.model_dump(mode="json", exclude_none=True)
    for fields in [tree, *chain.from_iterable(named.values() for named in tree["axes"].values())]:
        if "config" in fields:
            config = resolve(fields["config"], source.parent.resolve())
            fields["config"] = os.path.relpath(config, folder.resolve())
    return tomli_w.dumps(tree)


def flat(tree: Mapping[str, Any], prefix: str = "") -> Fields:
    """Return fields by their dotted names: {"client": {"steps": 3}} as {"client.steps": 3}.

    The three splits of a `text` stay together, as they are one value.
    """
    fields: Fields = {}
    for key, value in tree.items():
        is_section = isinstance(value, Mapping)
        if is_section and key.rpartition(".")[2] == "text":  # or the name of a client
            is_section = not {*value} <= {*SPLITS}
        if is_section:
            fields |= flat(value, f"{prefix}{key}.")
        else:
            fields[f"{prefix}{key}"] = value
    return fields


def literal(value: Any) -> str:
    """Return a value as TOML writes it after `=`, in one line."""
    if isinstance(value, Mapping):
        parts = [f"{json.dumps(key)} = {literal(inner)}" for key, inner in value.items()]
        return f"{{{', '.join(parts)}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(literal, value))}]"
    return tomli_w.dumps({"x": value}).removeprefix("x = ").rstrip("\n")


def _overrides(fields: Fields) -> list[str]:
    return [f"{key}={literal(value)}" for key, value in fields.items() if key != "config"]


def _require_known(where: str, kind: str, given: str, known: list[str]) -> None:
    if given not in known:
        raise ValueError(
            f'{where}: no {kind} "{given}".{nearest(given, known)} There are: {", ".join(known)}'
        )
