"""This module reads a config from TOML and writes it back, with every mistake in one line."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from comigs.config.address import set_field
from comigs.config.conditions import ConditionsFile, without_other_ways
from comigs.config.errors import one_line
from comigs.config.older import of_this_version, without_retired
from comigs.config.paths import place, read_named, read_template, whole
from comigs.config.trace import read_trace
from comigs.config.tree import SECTIONS, VERSION, Config
from comigs.errors import UserError

MAX_DEPTH = 32  # levels of sections and lists; the deepest field of a config or sweep has six
TOO_DEEP = f"sections or lists are nested too deeply; at most {MAX_DEPTH} levels"


def load_config(path: str | Path, overrides: Iterable[str] = (), own: bool = True) -> Config:
    """Return the config of a TOML file, with `key=value` overrides applied and everything checked.

    own: the file is the user's, and so may name a file whose text becomes part of the config; that
    of a run holds the text itself, and may be a stranger's. Raises UserError with one line for
    whatever is wrong.
    """
    path = Path(path)
    tree = read_toml(path)
    for override in overrides:
        _apply(tree, override)

    # what depends on where the file lies is made to mean the same from everywhere
    tree.setdefault("name", path.stem)
    place(tree, path.parent, str(path))
    if own:
        read_template(tree, path.parent, str(path))
        read_conditions(tree, path.parent, str(path))
    return parse_config(tree, source=str(path))


def read_toml(path: Path, what: str = "config") -> dict[str, Any]:
    """Return a TOML file as plain values. what: what the file is, for the UserErrors raised."""
    try:
        # some editors put a byte order mark in front, which TOML has no word for
        tree = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such {what} file") from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror or error}; a {what} is a TOML file"
        ) from None
    except RecursionError:
        raise UserError(f"{path}: {TOO_DEEP}") from None
    except ValueError as error:
        raise UserError(f"{path}: cannot be read as TOML: {error}") from None
    require_shallow(tree, str(path))
    return tree


def read_conditions(
    tree: dict[str, Any], folder: Path, source: str, above: tuple[str, ...] = ()
) -> None:
    """Put what files say of devices in the place of their names, in the values of a user's config.

    above: the files that named this one. Raises UserError where there is no such file, it holds
    something else, or leads back to itself.
    """
    conditions = tree.get("conditions")
    if not isinstance(conditions, dict):
        return
    named = conditions.pop("file", None)
    if isinstance(named, str):
        path, above = Path(whole(named, folder)), (*above, whole(source, Path()))
        if str(path) in above:
            raise UserError(f"{source}: conditions.file: {named} leads back here; name another")
        given = read_toml(path, "conditions")
        if given.keys() != {"conditions"} or not isinstance(given["conditions"], dict):
            raise UserError(f"{path}: must hold [conditions] and nothing else")
        read_conditions(given, path.parent, str(path), above)
        try:
            ConditionsFile.model_validate(given)
        except ValidationError as error:
            raise UserError(f"{path}: {one_line(error, given, SECTIONS)}") from None
        tree["conditions"] = conditions = _over(conditions, given["conditions"])
    elif named is not None:
        conditions["file"] = named  # to be refused

    # A trace that has lines is a text already.
    nested: dict[str, Any] = {"conditions": conditions}
    for kind in ("groups", "clients"):
        below = conditions.get(kind)
        for name, section in below.items() if isinstance(below, dict) else ():
            nested[f"conditions.{kind}.{name}"] = section
    for where, section in nested.items():
        given_trace = section.get("trace") if isinstance(section, dict) else None
        if isinstance(given_trace, str) and "\n" not in given_trace:
            file, named_in = whole(given_trace, folder), f"{source}: {where}.trace"
            section["trace"] = read_named(file, named_in)
            try:
                read_trace(section["trace"])
            except ValueError as error:
                raise UserError(f"{named_in}: {file}: {error}") from None


def _over(own: dict[str, Any], general: dict[str, Any]) -> dict[str, Any]:
    """Return the general values with the own ones over them, section by section.

    Of ways to say the same thing one's own replaces the general ones.
    """
    both = without_other_ways(general, own)
    for key, value in own.items():
        under = both.get(key)
        if isinstance(value, dict) and isinstance(under, dict):
            value = _over(value, under)
        both[key] = value
    return both


def require_shallow(tree: Any, source: str) -> None:
    """Raise UserError where values are nested so deeply that looking at them would not end well.

    source: what the tree was read from, which begins the line.
    """
    level = [tree]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for node in level:
            if isinstance(node, Mapping):
                below += node.values()
            elif isinstance(node, list):
                below += node
        level = below
    if level:
        raise UserError(f"{source}: {TOO_DEEP}")


def parse_config(tree: Mapping[str, Any], source: str = "config") -> Config:
    """Return the config that a tree of plain values is.

    Raises UserError that says the field, what was given and what is allowed. source: what the tree
    was read from, which begins the line.
    """
    require_shallow(tree, source)
    tree = of_this_version(without_retired(tree, source))
    version = tree.get("version", VERSION)
    if isinstance(version, int) and version > VERSION:
        raise UserError(
            f"{source}: version: written for config format {version}, "
            f"this comigs reads up to {VERSION}; upgrade comigs"
        )
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{source}: {one_line(error, tree, SECTIONS)}") from None


def to_toml(config: Config) -> str:
    """Write the config as TOML; reading that gives an equal config."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set one `section.key=value`, a client's by its name: `clients.fr.rank=4`."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {override}: expected KEY=VALUE, for example client.steps=20")
    # a bare word is a string
    value: Any = text.strip()
    try:
        read = tomllib.loads(f"x = {text}")
        value = read["x"] if len(read) == 1 else value
    except RecursionError:
        raise UserError(f"--set {key}: {TOO_DEEP}") from None
    except ValueError:
        pass
    try:
        set_field(tree, key, value)
    except UserError as error:
        raise UserError(f"--set {override}: {error}") from None
