"""Simulated devices and links for clients that are all in one process (docs/conditions.md)."""
