"""This room holds federations over a real network: their folders and keys, the processes of a
server and of a device, and their runs.

Flower's programs run as processes of their own; only the room `flower` imports flwr.
"""

from __future__ import annotations

from comigs.errors import require_extra


def require_flower() -> None:
    """Raise UserError where Flower, or what comes with it, is not installed."""
    require_extra("flower", ("flwr", "cryptography"), "a federation")
