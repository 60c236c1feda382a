"""The sweep file: axes of named values, each a few fields of the config; read, checked and written
back whole.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import tomli_w
from pydantic import Field, ValidationError, field_validator, model_validator

from comigs.config import Section, read_toml
from comigs.config.errors import one_line
from comigs.errors import UserError, nearest

Fields = dict[str, Any]  # `client.steps` -> value
NAME = r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,63}"  # of an axis or a value: also a folder


class Sweep(Section):
    """A whole sweep: the product of all axes and seeds, less what is skipped."""

    name: str = Field(
        description="of the sweep, and of its folder in `runs`; default: the file's, without .toml"
    )
    config: str | None = Field(
        None, description="run TOML that all runs start from, where no axis says it"
    )
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (42,), description="each combination runs once per seed"
    )
    baseline: str | None = Field(
        None, description="the value of an axis that `comigs compare` compares against"
    )
    set: Fields = Field({}, description="fields of the config for every run, as in --set")
    axes: dict[str, dict[str, Fields]] = Field(
        {}, description="axis -> value -> the fields that this value sets"
    )
    skip: tuple[dict[str, str], ...] = Field(
        (), description="combinations to leave out, each {axis = value, ...}"
    )

    @field_validator("name")
    @classmethod
    def _name_is_a_folder_name(cls, value: str) -> str:
        if not re.fullmatch(NAME, value):
            raise ValueError(
                "must be letters, digits, '.', '_', '+', '=' or '-', the first a letter or digit"
            )
        return value

    @field_validator("set")
    @classmethod
    def _flat_set(cls, value: Fields) -> Fields:
        return flat(value)

    @field_validator("axes")
    @classmethod
    def _flat_axes(cls, value: dict[str, dict[str, Fields]]) -> dict[str, dict[str, Fields]]:
        return {
            axis: {name: flat(fields) for name, fields in named.items()}
            for axis, named in value.items()
        }

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
            for name in (axis, *values):
                if not re.fullmatch(NAME, name):
                    raise ValueError(
                        f'axes.{axis}: the name "{name}" is also a folder: '
                        "letters, digits, '.', '_', '+', '=' or '-', the first a letter or digit"
                    )
            if len({name.lower() for name in values}) < len(values):
                raise ValueError(
                    f"axes.{axis}: two values have the same name; names must differ (case aside)"
                )

    def _check_fields(self) -> None:
        layers = {"set": self.set} | {
            f"axes.{a}.{n}": f for a, named in self.axes.items() for n, f in named.items()
        }
        for where, fields in layers.items():
            if "seed" in fields:
                raise ValueError(f"{where}: seed: write seeds = [42, ...] at the top of the file")
            wrong = [key for key in fields if not re.fullmatch(r"[A-Za-z0-9._-]+", key)]
            if wrong:
                raise ValueError(
                    f'{where}: "{wrong[0]}" is no field of the config; write for example client.steps = 20'
                )

    def _check_config(self) -> None:
        """Every run starts from exactly one run TOML."""
        if "config" in self.set:
            raise ValueError(
                "set.config: write config = ... at the top of the file, or in each value of one axis"
            )
        where = ["config"] if self.config is not None else []
        where += [
            f"axes.{axis}"
            for axis, named in self.axes.items()
            if any("config" in f for f in named.values())
        ]
        if not where:
            raise ValueError(
                'config: missing; write config = "quickstart.toml" at the top, or in each value of one axis'
            )
        if len(where) > 1:
            raise ValueError(f"config: given in {' and in '.join(where)}; must be in one place")
        for axis, named in self.axes.items():
            for name, fields in named.items():
                given = fields.get("config", "")
                if where == [f"axes.{axis}"] and not given:
                    raise ValueError(
                        f"axes.{axis}.{name}.config: missing; all values of an axis have one, or none"
                    )
                if not isinstance(given, str):
                    raise ValueError(
                        f"axes.{axis}.{name}.config: given {given!r}; must be a path in quotes"
                    )

    def _check_baseline(self) -> None:
        if self.baseline is None:
            return
        homes = [axis for axis, values in self.axes.items() if self.baseline in values]
        if not homes:
            names = [name for values in self.axes.values() for name in values]
            raise ValueError(
                f'baseline: no axis has a value "{self.baseline}".{nearest(self.baseline, names)} '
                f"There are: {', '.join(names)}"
            )
        if len(homes) > 1:
            raise ValueError(
                f'baseline: "{self.baseline}" is a value of {" and of ".join(homes)}; rename one'
            )

    def _check_skip(self, where: str, entry: Mapping[str, str]) -> None:
        if not entry:
            raise ValueError(
                f"{where}: empty, which would skip everything; write {{ AXIS = VALUE }}"
            )
        for axis, name in entry.items():
            for kind, given, known in (
                ("axis", axis, self.axes),
                ("value", name, self.axes.get(axis, {})),
            ):
                if given not in known:
                    raise ValueError(
                        f'{where}: no {kind} "{given}".{nearest(given, list(known))} There are: {", ".join(known)}'
                    )

    def config_of(self, choice: Mapping[str, str]) -> tuple[str, str]:
        """The run TOML of a combination as written, and where it is written."""
        for axis, name in choice.items():
            if "config" in self.axes[axis][name]:
                return self.axes[axis][name]["config"], f"axes.{axis}.{name}.config"
        assert self.config is not None
        return self.config, "config"

    def layers(self, choice: Mapping[str, str], seed: int) -> dict[str, list[str]]:
        """`key=value` overrides of a run in the order they apply, by where they are written."""
        layers = {"set": self.set} | {
            f"axes.{axis}.{name}": self.axes[axis][name] for axis, name in choice.items()
        }
        return {where: _overrides(fields) for where, fields in layers.items()} | {
            "seeds": [f"seed={seed}"]
        }


def read_sweep(path: Path) -> Sweep:
    """Raises UserError with one line for whatever is wrong with the file itself; runs are checked
    in `plan`.
    """
    tree = {"name": path.stem, **read_toml(path, "sweep")}
    try:
        return Sweep.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{path}: {one_line(error, tree, {'': Sweep})}") from None


def to_toml(sweep: Sweep, source: Path, folder: Path) -> str:
    """The sweep as it was resolved, for a file in `folder`; paths relative to it, so that they mean
    the same.
    """
    tree = sweep.model_dump(mode="json", exclude_none=True)
    for fields in (tree, *(f for named in tree["axes"].values() for f in named.values())):
        if "config" in fields:
            fields["config"] = os.path.relpath(
                source.parent.resolve() / fields["config"], folder.resolve()
            )
    return tomli_w.dumps(tree)


def flat(tree: Mapping[str, Any], prefix: str = "") -> Fields:
    """{"client": {"steps": 3}} and {"client.steps": 3} are the same; the three splits of a `text`
    stay together.
    """
    fields: Fields = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and key.rpartition(".")[2] != "text":
            fields |= flat(value, f"{prefix}{key}.")
        else:
            fields[f"{prefix}{key}"] = value
    return fields


def _overrides(fields: Fields) -> list[str]:
    return [f"{key}={literal(value)}" for key, value in fields.items() if key != "config"]


def literal(value: Any) -> str:
    """A value as TOML writes it after `=`, in one line."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{json.dumps(key)} = {literal(v)}' for key, v in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(literal, value))}]"
    return tomli_w.dumps({"x": value}).removeprefix("x = ").rstrip("\n")
