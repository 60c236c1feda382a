"""This module gives configs that older versions wrote the words of this one.

In version 1, comigs without any number of experts was what has been called comigs-others since. In
versions 1 and 2, the personal model was that of the last round. Up to version 3, comigs ended with
its mixture, whatever valid said. Up to version 4, every LoRA was of one rank unless it was said, 8
by default, comigs' specialists were experts apart, and its attention LoRA was the mean.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from comigs.errors import UserError

RETIRED = {  # a field that older versions wrote into runs -> the only value it may still have
    "client.leaky_gradients": False,
}
NUMBERS = ("generalists", "specialists", "specialist_rank")


def of_this_version(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tree of a config in the words of this version.

    A tree without a version is of this version. What is no config is left to be refused.
    """
    version, renewed = tree.get("version"), dict(tree)
    if version == 1 and tree.get("method", "comigs") == "comigs" and not _numbers_experts(tree):
        renewed["method"] = "comigs-others"
        # "valid" was all that this method took
        options = tree.get("options")
        if isinstance(options, Mapping) and options.get("adopt") == "valid":
            renewed["options"] = {key: value for key, value in options.items() if key != "adopt"}

    evaluation = tree.get("evaluation", {})
    if version in (1, 2) and isinstance(evaluation, Mapping):
        renewed["evaluation"] = {"keep": "last", **evaluation}
    if version in (1, 2, 3):
        _put_options(renewed, {"finish": "mixture"})
    if version in (1, 2, 3, 4):
        renewed |= _with_ranks(tree)
        _put_options(renewed, {"specialists": "apart", "attention": "mean"})
        renewed["version"] = 5
    return renewed


def _put_options(tree: dict[str, Any], then: Mapping[str, Any]) -> None:
    """Write into a tree what comigs did then, where it does not say something else."""
    options = tree.get("options", {})
    if tree.get("method", "comigs") == "comigs" and isinstance(options, Mapping):
        tree["options"] = {**then, **options}


def _with_ranks(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sections of a config of version 4 that give ranks, with those that it left out."""
    experts, clients = tree.get("experts", {}), tree.get("clients")
    if not isinstance(experts, Mapping):
        return {}
    rank = experts.get("rank", 8)
    every = {"rank": rank, "specialist_rank": rank, "attention_rank": rank}
    found: dict[str, Any] = {"experts": {**every, **experts}}
    # A client of another rank had specialists of that rank, too.
    if isinstance(clients, list) and "specialist_rank" not in experts:
        found["clients"] = [_with_one_rank(client) for client in clients]
    return found


def _with_one_rank(client: Any) -> Any:
    if isinstance(client, Mapping) and client.get("rank") is not None:
        return {"specialist_rank": client["rank"], **client}
    return client


def _numbers_experts(tree: Mapping[str, Any]) -> bool:
    """Say whether a config gives any number of experts or rank of specialists."""
    clients = tree.get("clients")
    parts = [tree.get("experts"), *(clients if isinstance(clients, list) else [])]
    for part in parts:
        if isinstance(part, Mapping) and any(part.get(key) is not None for key in NUMBERS):
            return True
    return False


def without_retired(tree: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the tree without the fields that are no more.

    Raises UserError where one asks for what is no more. source: what the tree was read from.
    """
    kept = dict(tree)
    for field, value in RETIRED.items():
        name, _, key = field.partition(".")
        section = kept.get(name)
        if not isinstance(section, Mapping) or key not in section:
            continue
        if section[key] != value:
            raise UserError(
                f"{source}: {field}: given {json.dumps(section[key], default=str)}; "
                f"this field is retired and can only be {json.dumps(value)}; leave it out"
            )
        kept[name] = {other: given for other, given in section.items() if other != key}
    return kept
