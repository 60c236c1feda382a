"""This module finds a field by its address in a config, as `--set` and sweeps name it.

An address is keys with dots between them, `client.steps`, written as TOML writes keys: a key may be
in quotes. Behind `clients` comes the name of a client, which may hold dots itself:
`clients.fr.rank`, `clients.a.b.rank`, `clients."a.b".rank`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from comigs.config.clients import ClientEntry, Text
from comigs.errors import UserError, nearest


def keys_of(address: str) -> list[str]:
    """Return the keys of an address; what TOML cannot read as a key is cut at its dots."""
    plain = address.strip().split(".")
    try:
        node: Any = tomllib.loads(f"{address} = 0")
    except ValueError:
        return plain
    keys = []
    while isinstance(node, Mapping):
        if len(node) != 1:
            return plain
        ((key, node),) = node.items()
        keys.append(key)
    return keys


def set_field(tree: dict[str, Any], address: str, value: Any) -> None:
    """Put a value at its address in the plain values of a config.

    Raises UserError, which does not repeat the address, where there is no such place.
    """
    # a section that the file leaves out is made on the way to the key
    keys = keys_of(address)
    node: Any = tree
    position = 0
    while position < len(keys) - 1:
        if isinstance(node, list):
            node, passed = _client(node, keys[position:])
        else:
            node, passed = node.setdefault(keys[position], {}), 1
        position += passed
        if not isinstance(node, dict | list):
            raise UserError(f"{'.'.join(keys[:position])} is a value, not a section")

    # what is left of the address is a field, or the name of a client without one
    if isinstance(node, list):
        _client(node, keys[position:])
    if isinstance(node, list) or position == len(keys):
        raise UserError(f"say which field of the client, for example {address.strip()}.rank=4")
    node[keys[-1]] = value


def _client(clients: Sequence[Any], keys: Sequence[str]) -> tuple[dict[str, Any], int]:
    """Return the entry of `clients` that the keys begin with, and how many keys name it.

    A whole number is the name of the client that is called so. Only where no client is called by a
    number is it a position in the file. Raises UserError where there is no such client.
    """
    entries = [entry for entry in clients if isinstance(entry, dict)]
    names = [str(entry.get("name")) for entry in entries]

    # the longest name counts, unless only a shorter one leaves a field behind it
    found = []
    for length in range(len(keys), 0, -1):
        if (name := ".".join(keys[:length])) in names:
            found.append((entries[names.index(name)], length))
    for entry, length in found:
        if _is_field(keys[length:]):
            return entry, length
    if found:
        return found[0]

    # a position is a way to name a client only where it can be no name
    first = keys[0]
    numbers = [str(number) for number in range(len(entries))]
    if first in numbers and not any(name.isdigit() for name in names):
        return entries[int(first)], 1
    raise UserError(f'no client "{first}"; there are: {", ".join(names)}.{nearest(first, names)}')


def _is_field(keys: Sequence[str]) -> bool:
    """Return whether the keys are a field of a client."""
    if len(keys) == 2:
        return keys[0] == "text" and keys[1] in Text.model_fields
    return len(keys) == 1 and keys[0] in ClientEntry.model_fields
