"""This room holds federations over a real network: their folders and keys, the processes of a
server and of a device, and their runs.

Flower's programs run as processes of their own; only the room `flower` imports flwr.
"""

from __future__ import annotations

from importlib.util import find_spec

from comigs.errors import UserError


def require_flower() -> None:
    """Raise UserError where Flower, or what comes with it, is not installed."""
    if find_spec("flwr") is None or find_spec("cryptography") is None:
        raise UserError("a federation needs Flower: pip install 'comigs[flower]'")
