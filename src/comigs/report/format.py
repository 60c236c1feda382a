"""How numbers are written for people: the one place, for the page and for the terminal. None is a dash."""

from __future__ import annotations

from collections.abc import Iterable

NONE = "\N{EN DASH}"


def perplexity(value: float | None) -> str:
    """Three figures or whole numbers: 9.53, 95.3, 612; very large ones as 1.2e+07."""
    if value is None:
        return NONE
    if value >= 1e6:
        return f"{value:.1e}"
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"


def decimal(value: float | None) -> str:
    """Three decimals, for nats per token, bits per byte and drift."""
    return NONE if value is None else f"{value:.3f}"


def share(value: float | None) -> str:
    """Two decimals, for routing weights."""
    return NONE if value is None else f"{value:.2f}"


def percent(value: float | None) -> str:
    """A fraction as a percentage with one decimal; no -0.0."""
    return NONE if value is None else f"{round(100 * value, 1) + 0.0:.1f} %"


def count(value: float | None) -> str:
    """A whole number with thousands separated."""
    return NONE if value is None else f"{value:,.0f}"


def size(value: float | None) -> str:
    """Bytes with a decimal unit: 0 B, 512 B, 98.3 kB, 1.2 MB."""
    if value is None:
        return NONE
    if value < 1000:
        return f"{value:.0f} B"
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 999.95:
            return f"{value:.1f} {unit}"
    return f"{value / 1000:,.1f} TB"


def duration(value: float | None) -> str:
    """Seconds, minutes or hours."""
    if value is None:
        return NONE
    if value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"


def rounds(values: Iterable[int]) -> str:
    """Round numbers with runs of them joined: 3, 5 to 9."""
    parts: list[list[int]] = []
    for value in sorted(set(values)):
        if parts and value == parts[-1][-1] + 1:
            parts[-1].append(value)
        else:
            parts.append([value])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]} to {p[-1]}" for p in parts)


def plural(number: int, word: str) -> str:
    """1 client, 4 clients."""
    return f"{number} {word}" + ("" if number == 1 else "s")
