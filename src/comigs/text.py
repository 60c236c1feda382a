"""How numbers and tables are written for people: the one place, for the page and for the terminal.
None is a dash.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

NONE = "\N{EN DASH}"


@dataclass(frozen=True)
class Table:
    """Headers, rows and a closing row (mean or total), all text. The first `names` columns are
    words, not numbers.

    best, second: (row, column) of the cells to mark as the best and second best of their column.
    """

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    last: tuple[str, ...] | None = None
    names: int = 1
    best: frozenset[tuple[int, int]] = frozenset()
    second: frozenset[tuple[int, int]] = frozenset()


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


def spread(mean: float | None, sd: float | None, places: int) -> str:
    """Mean and standard deviation, as 95.27 ± 0.42; one seed has no deviation."""
    if mean is None:
        return NONE
    return f"{mean:,.{places}f}" + ("" if sd is None else f" \N{PLUS-MINUS SIGN} {sd:,.{places}f}")


def places(means: Iterable[float], sds: Iterable[float | None]) -> int:
    """Decimals for a column of means: two figures of the middle deviation, or four of the largest
    mean without one.
    """
    known = [sd for sd in sds if sd]
    if known:
        return min(5, max(0, 1 - math.floor(math.log10(median(known)))))
    largest = max((abs(m) for m in means), default=0)
    return min(4, max(0, 3 - math.floor(math.log10(largest)))) if largest else 0


def signed(mean: float | None, sd: float | None, places: int) -> str:
    """A difference with its deviation, as -0.031 ± 0.004; no -0.000."""
    if mean is None:
        return NONE
    return f"{round(mean, places) + 0.0:+.{places}f}" + (
        "" if sd is None else f" \N{PLUS-MINUS SIGN} {sd:.{places}f}"
    )


def change(value: float | None) -> str:
    """A fraction as a percentage with its sign."""
    if value is None:
        return NONE
    rounded = round(100 * value, 1)
    return f"{rounded:+,.1f} %" if rounded else "0.0 %"


def probability(value: float | None) -> str:
    """A p value: 0.43, 0.031, <0.001."""
    if value is None:
        return NONE
    return "<0.001" if value < 0.001 else f"{value:.{2 if value >= 0.0995 else 3}f}"


def ratio(value: float) -> str:
    """A factor, with more decimals near 1: 0.50x, 1.010x."""
    return f"{value:.{3 if abs(value - 1) < 0.1 else 2}f}\N{MULTIPLICATION SIGN}"


def listed(names: Sequence[str]) -> str:
    """a, b and c; long lists are cut."""
    shown = [*names[:7], f"{len(names) - 7} more"] if len(names) > 8 else [*names]
    return " and ".join(part for part in (", ".join(shown[:-1]), shown[-1]) if part)


def plural(number: int, word: str) -> str:
    """1 client, 4 clients."""
    return f"{number} {word}" + ("" if number == 1 else "s")
