"""A config from a TOML file and back, with every mistake in one line."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from comigs.config.errors import one_line
from comigs.config.tree import SECTIONS, VERSION, Config
from comigs.errors import UserError, nearest
from comigs.files import folder_or_name


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a TOML file, apply `key=value` overrides, validate.

    Raises UserError with one line for whatever is wrong.
    """
    path = Path(path)
    tree = read_toml(path)
    for override in overrides:
        _apply(tree, override)
    tree.setdefault("name", path.stem)
    data, base = tree.setdefault("data", {}), tree.get("base")
    if isinstance(data, dict):
        data["root"] = str((path.parent / str(data.get("root", "."))).resolve())
    if isinstance(base, dict) and isinstance(base.get("name"), str):
        base["name"] = folder_or_name(base["name"], path.parent)
    return parse_config(tree, source=str(path))


def read_toml(path: Path, what: str = "config") -> dict[str, Any]:
    """A TOML file as plain values. Raises UserError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such {what} file") from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror or error}; a {what} is a TOML file"
        ) from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: cannot be read as TOML: {error}") from None


def parse_config(tree: Mapping[str, Any], source: str = "config") -> Config:
    """Validate a tree of plain values. Raises UserError: the field, what was given, what is
    allowed.
    """
    version = tree.get("version", VERSION)
    if isinstance(version, int) and version > VERSION:
        raise UserError(
            f"{source}: version: written for config format {version}, this comigs reads up to {VERSION}; upgrade comigs"
        )
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{source}: {one_line(error, tree, SECTIONS)}") from None


def to_toml(config: Config) -> str:
    """The config as TOML; reading it back gives an equal config."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set one `section.key=value`; clients are addressed by name or position:
    `clients.fr.rank=4`.
    """
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {override}: expected KEY=VALUE, for example client.steps=20")
    try:
        value = tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word is a string
    *parents, last = key.strip().split(".")
    node: Any = tree
    for depth, part in enumerate(parents):
        if isinstance(node, list):
            found = [
                n
                for i, n in enumerate(node)
                if isinstance(n, dict) and part in (n.get("name"), str(i))
            ]
            if not found:
                names = [str(n.get("name")) for n in node if isinstance(n, dict)]
                known = ", ".join(names)
                raise UserError(
                    f'--set {override}: no client "{part}"; there are: {known}.{nearest(part, names)}'
                )
            node = found[0]
        else:
            node = node.setdefault(part, {})
        if not isinstance(node, dict | list):
            raise UserError(
                f"--set {override}: {'.'.join(parents[: depth + 1])} is a value, not a section"
            )
    if isinstance(node, list):
        raise UserError(
            f"--set {override}: say which field of the client, for example {key}.rank=4"
        )
    node[last] = value
