"""Who may use which model: a file of keys, one for each model id."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable
from pathlib import Path

from comigs.config import read_toml
from comigs.errors import UserError, nearest
from comigs.text import listed

SHORTEST = 20  # characters of a key; `secrets.token_urlsafe(32)` has 43


class Keys:
    """The keys of a server. What is held are their hashes, which are as long as each other."""

    def __init__(self, keys: dict[str, str]) -> None:
        """Keep these keys: model id -> key."""
        self._hashes = {model: _hash(key) for model, key in keys.items()}

    def opens(self, key: str) -> str | None:
        """Return the model that this key opens. Every key is looked at, and each comparison takes
        the same time.
        """
        given, found = _hash(key), None
        for model, hashed in self._hashes.items():
            if hmac.compare_digest(given, hashed):
                found = model
        return found


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def is_loopback(host: str) -> bool:
    """Say whether only this machine can reach an address. Of names, only localhost is one."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_keys(path: Path, models: Iterable[str]) -> Keys:
    """Read a TOML file with one key for each model: "run/ann" = "...". Raises UserError."""
    try:
        content = read_toml(path, "keys")
    except UserError as error:
        raise UserError(f"--keys: {error}") from None
    if path.stat().st_mode & 0o077:
        raise UserError(
            f"--keys: {path} can be read by other users of this machine; close it with: "
            f"chmod 600 {path}"
        )
    # Each key opens a model that there is, and each model has a key.
    served = list(models)
    for model, key in content.items():
        if model not in served:
            raise UserError(
                f'--keys: {path}: "{model}" is not served.{nearest(model, served)} '
                f"Served: {listed(served)}"
            )
        if not isinstance(key, str) or len(key) < SHORTEST:
            raise UserError(
                f'--keys: {path}: the key of "{model}" must be a text of {SHORTEST} characters '
                "or more"
            )
        # a header holds no others, and none at its ends
        if not (key.isascii() and key.isprintable() and key == key.strip()):
            raise UserError(
                f'--keys: {path}: the key of "{model}" must be of letters, digits and signs of '
                "ASCII, without a blank at either end"
            )
    if missing := [model for model in served if model not in content]:
        raise UserError(
            f"--keys: {path}: no key for {listed(missing)}; every model that is served needs one"
        )
    # A key that opened two models would let their owners use each other's.
    if len(set(content.values())) < len(content):
        raise UserError(f"--keys: {path}: two models have the same key; a key opens one model")
    return Keys(content)
