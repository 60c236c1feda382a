"""One rule leads from what a user writes to a path, wherever a config or a sweep has one.

A path may be whole or begin with a home folder (`~`). Any other starts from the folder of the file
that names it. In the config of a run these are relative to the run, so that a run can move together
with what it names, and no path of this machine is passed on.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from comigs.config.base import NAMED_BASES
from comigs.config.sections import DataSection
from comigs.config.templates import TEMPLATES
from comigs.config.tree import Config
from comigs.errors import UserError

CACHE = str(DataSection().cache)  # which starts from the working folder, also where it is written


def resolve(path: str, folder: Path) -> Path:
    """Return the path that `path` means in a file of `folder`.

    Raises UserError where a home folder is nobody's, or nothing can be called so.
    """
    if "\0" in path:
        raise UserError(f"{path!r}: a path cannot hold the character \\0")
    try:
        return folder / Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: no such user; give the whole path") from None


def whole(path: str, folder: Path) -> str:
    """Return what `resolve` does, from the root on and without links. Raises UserError."""
    return os.path.realpath(resolve(path, folder))


def folder_or_name(name: str, beside: Path) -> str:
    """Return the whole path of the folder or .gguf file that the name of a base means.

    It lies in `beside` or in the working folder. What goes by a name of ours, or is no such
    thing, is a name and is returned as it is; what can only be a path is made whole even so.
    Raises UserError.
    """
    if not name or name in NAMED_BASES:
        return name
    places = [whole(name, beside), whole(name, Path())]
    for place in places:
        if os.path.isdir(place) or (name.endswith(".gguf") and os.path.isfile(place)):
            return place
    return places[0] if name.startswith(("~", ".", "/")) else name


def read_template(tree: dict[str, Any], folder: Path, source: str) -> None:
    """Put a chat template in the place of its name, or its file's, in a user's config.

    Raises UserError where there is no such file.
    """
    base = tree.get("base")
    given = base.get("chat_template") if isinstance(base, dict) else None
    if isinstance(given, str) and given in TEMPLATES:
        tree["base"]["chat_template"] = TEMPLATES[given]
    elif isinstance(given, str) and "{" not in given:
        path, field = whole(given, folder), f"{source}: base.chat_template"
        if not os.path.exists(path):
            raise UserError(f"{field}: {path}: no such file; by name: {', '.join(TEMPLATES)}")
        tree["base"]["chat_template"] = read_named(path, field)


def read_named(path: str, field: str) -> str:
    """Return the text of a file that a field names. Raises UserError where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"{field}: {path}: cannot be read: {why}") from None


def place(tree: dict[str, Any], folder: Path, source: str) -> None:
    """Make the paths whole in the plain values of a config of `folder`.

    source: what the values were read from, which begins the line of the UserErrors raised. What is
    no text is left for the check of the whole config to refuse.
    """
    data, base = tree.setdefault("data", {}), tree.get("base")
    field = "data.root"
    try:
        if isinstance(data, dict):
            root = data.setdefault("root", ".")
            if isinstance(root, str):
                data["root"] = whole(root, folder)
            field, cache = "data.cache", data.get("cache", CACHE)
            if isinstance(cache, str) and cache != CACHE:
                data["cache"] = whole(cache, folder)
        field = "base.name"
        if isinstance(base, dict) and isinstance(base.get("name"), str):
            base["name"] = folder_or_name(base["name"], folder)
    except UserError as error:
        raise UserError(f"{source}: {field}: {error}") from None


def relative(config: Config, folder: Path) -> Config:
    """Return a config for a file in `folder`: `place` makes this one of it again."""
    start = os.path.realpath(folder)
    moved = {"root": Path(os.path.relpath(os.path.realpath(config.data.root), start))}
    if str(config.data.cache) != CACHE:
        moved["cache"] = Path(os.path.relpath(os.path.realpath(config.data.cache), start))

    # a base that is a folder is told from a name by the dot in front
    name = config.base.name
    if os.path.isabs(name):
        name = os.path.relpath(os.path.realpath(name), start)
        if not name.startswith("."):
            name = f"./{name}"
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=moved),
            "base": config.base.model_copy(update={"name": name}),
        }
    )
