"""A federation over a real network: its folder and keys, the server's and a device's processes, and
its runs.

Flower's programs run as processes of their own; nothing here imports flwr.
"""

from __future__ import annotations

from importlib.util import find_spec

from comigs.errors import UserError


def require_flower() -> None:
    """Raises UserError where Flower, and what comes with it, is not installed."""
    if find_spec("flwr") is None or find_spec("cryptography") is None:
        raise UserError("a federation needs Flower: pip install 'comigs[flower]'")
