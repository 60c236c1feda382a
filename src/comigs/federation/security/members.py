"""This module says whose device sent a request, from the head of the request alone: Flower's
devices sign each request's time with their key.

Flower's SuperLink asks the same, and more, but only after it has read the whole body.
"""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as s
from cryptography.hazmat.primitives.asymmetric import ec

KEY, TIME, SIGNATURE = "flwr-public-key", "flwr-timestamp", "flwr-signature"


class Members:
    """Members are the clients that were invited and not revoked, as clients.json says now."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._read: tuple[int, int] = (0, 0)  # when the file was changed, and which it is
        self._names: dict[bytes, tuple[str, ec.EllipticCurvePublicKey]] = {}

    def sender(self, headers: Mapping[str, str]) -> str | None:
        """Return the name of the client that signed a request, or None where no member did."""
        self._look()
        try:
            key = b64decode(headers[KEY], validate=True)
            name, public = self._names[key]
            signature = b64decode(headers[SIGNATURE], validate=True)
            public.verify(signature, headers[TIME].encode("ascii"), ec.ECDSA(hashes.SHA256()))
        except (KeyError, ValueError, InvalidSignature):
            return None
        return name

    def _look(self) -> None:
        """Read the file anew where it has changed: who is invited or revoked is known at once."""
        try:
            found = self._file.stat()
            if (found.st_mtime_ns, found.st_ino) != self._read:
                self._names = _by_key(json.loads(self._file.read_text(encoding="utf-8")))
                self._read = (found.st_mtime_ns, found.st_ino)
        except FileNotFoundError:
            self._names, self._read = {}, (0, 0)


def _by_key(clients: Mapping[str, Any]) -> dict[bytes, tuple[str, ec.EllipticCurvePublicKey]]:
    """Return name and key of each client by its key as Flower sends it, which is PEM."""
    names = {}
    for name, entry in clients.items():
        public = s.load_ssh_public_key(entry["public_key"].encode())
        assert isinstance(public, ec.EllipticCurvePublicKey)
        pem = public.public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
        names[pem] = (name, public)
    return names
