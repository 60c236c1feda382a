"""The address that invited devices have pinned; the apps are in comigs.federation.flower.apps."""

from comigs.federation.flower.apps import client, server

__all__ = ["client", "server"]
