"""Perplexity is exp of the nats per token."""

from __future__ import annotations

import math

LARGEST_EXPONENT = 700  # exp of more is no float


def perplexity_of(nats_per_token: float) -> float:
    """Return exp of the nats per token; above 700 nats, exp(700)."""
    return math.exp(min(nats_per_token, LARGEST_EXPONENT))
