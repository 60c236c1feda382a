"""Centralized: one model, trained on everybody's text with as many times the batch.

It shows what sharing text buys. Nothing stays on a device here: it is the yardstick of a
comparison, not a way to treat private text.
"""

from dataclasses import replace

from comigs.config import Config
from comigs.methods import fedavg
from comigs.methods.method import Method


def method(config: Config) -> Method:
    """Return fedavg's experts, trained once on pooled text; every client is measured with them."""
    return replace(
        fedavg.method(config),
        name="centralized",
        summary="one model on the pooled text of all clients, n times the batch; "
        "all text leaves the devices",
        paper="-",
        weights="-",
        averages=False,
        centralized=True,
        leaks="all text is in one place",
    )
