"""Numbers, lists and tables as people read them: on the page, in the terminal, in messages.

Each function returns text. A number that is not known (None) is written as a dash.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

Say = Callable[[str], None]  # takes a line for whoever looks on
NONE = "\N{EN DASH}"
PLUS_MINUS = "\N{PLUS-MINUS SIGN}"
# What a terminal obeys instead of showing it, what turns the direction of a line, and halves of
# characters, which cannot be written.
CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


@dataclass(frozen=True)
class Table:
    """A table holds headers, rows and perhaps a closing row (mean or total), all of them text.

    names: the number of leading columns that hold words; the others hold numbers.
    best, second: the (row, column) of each cell that is the best or second best of its column.
    """

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    last: tuple[str, ...] | None = None
    names: int = 1
    best: frozenset[tuple[int, int]] = frozenset()
    second: frozenset[tuple[int, int]] = frozenset()

    def __post_init__(self) -> None:
        """Keep the cells harmless: names and messages in them may be a stranger's."""
        object.__setattr__(self, "headers", tuple(map(one_line, self.headers)))
        object.__setattr__(self, "rows", tuple(tuple(map(one_line, row)) for row in self.rows))
        if self.last is not None:
            object.__setattr__(self, "last", tuple(map(one_line, self.last)))


def harmless(text: str) -> str:
    """Return any text as a page or a terminal can show it, with its lines and tabs."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


def one_line(text: str) -> str:
    """Return any text as one harmless line."""
    return harmless(re.sub(r"[\n\r\t\u2028\u2029]+", " ", text))


def brief(value: object, most: int = 300) -> str:
    """Return anything as one harmless line of at most so many characters."""
    text = value if isinstance(value, str) else repr(value)
    line = one_line(text[: most + 1])
    return line if len(line) <= most else f"{line[: most - 3]}..."


def perplexity(value: float | None) -> str:
    """Write three figures or a whole number, as 9.53, 95.3 and 612; from a million on, 1.2e+07."""
    for limit, form in ((10, ",.2f"), (100, ",.1f"), (1e6, ",.0f")):
        if value is None or value < limit:
            return _number(value, form)
    return _number(value, ".1e")


def decimal(value: float | None) -> str:
    """Write three decimals: for nats per token, bits per byte and drift."""
    return _number(value, ".3f")


def share(value: float | None) -> str:
    """Write two decimals: for routing weights."""
    return _number(value, ".2f")


def percent(value: float | None) -> str:
    """Write a fraction as a percentage with one decimal, as 51.9 %, and never -0.0 %."""
    if value is None:
        return NONE
    return f"{round(100 * value, 1) + 0.0:.1f} %"


def count(value: float | None) -> str:
    """Write a whole number with its thousands separated, as 11,728."""
    return _number(value, ",.0f")


def large(number: int) -> str:
    """Write three figures of a large number, as 4.2 M, 135 M and 7.1 B; a small one whole."""
    for power, unit in ((10**9, "B"), (10**6, "M")):
        if number >= 100 * power:
            return f"{number / power:.0f} {unit}"
        if number >= power:
            return f"{number / power:.1f} {unit}"
    return f"{number:,}"


def size(value: float | None) -> str:
    """Write bytes with a decimal unit, as 0 B, 512 B, 98.3 kB and 1.2 MB."""
    if value is None or value < 1000:
        return _number(value, ".0f", " B")
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 999.95:
            return f"{value:.1f} {unit}"
    return f"{value / 1000:,.1f} TB"


def parsed_size(text: str) -> float | None:
    """Return how many bytes a text as 1.5GB, 900 mb or 2 GiB says; None where it says no size."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmg])(i?)b", text, re.ASCII | re.IGNORECASE)
    if found is None:
        return None
    number, unit, binary = found.groups()
    thousand = 1024.0 if binary else 1000.0
    return float(number) * thousand ** (1 + "kmg".index(unit.lower()))


def duration(value: float | None, style: Literal["decimal", "clock", "about"] = "decimal") -> str:
    """Write seconds in the largest unit that fits.

    style: "decimal" for tables, as 50.0 s, 5.2 min and 2.0 h; "clock" for how long something took,
    as 50 s, 4 min 10 s and 2 h 05 min; "about" for an estimate, as about 50 s, about 5 min, about
    1.5 h and about 12 h.
    """
    if value is None:
        return NONE

    # a clock's parts are whole: 59.6 s are a minute
    if style == "clock":
        minutes, seconds = divmod(round(value), 60)
        hours, minutes = divmod(minutes, 60)
        if hours:
            return f"{hours} h {minutes:02} min"
        return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"

    # an estimate goes on to the next unit earlier, as it has no decimals to lose
    if style == "about":
        if value < 90:
            return f"about {value:.0f} s"
        if value < 5400:
            return f"about {value / 60:.0f} min"
        return f"about {value / 3600:.1f} h" if value < 36000 else f"about {value / 3600:.0f} h"

    if value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"


def rounds(values: Iterable[int]) -> str:
    """Write round numbers in their order with runs of them joined, as 3, 5 to 9."""
    runs: list[list[int]] = []
    for value in sorted(set(values)):
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    written = []
    for first, *more in runs:
        written.append(f"{first} to {more[-1]}" if more else str(first))
    return ", ".join(written)


def spread(mean: float | None, sd: float | None, places: int) -> str:
    """Write a mean and its standard deviation, as 95.27 ± 0.42; one seed has no deviation."""
    return _with_deviation(_number(mean, f",.{places}f"), sd, f",.{places}f")


def places(means: Iterable[float], sds: Iterable[float | None]) -> int:
    """Return how many decimals a column of means gets.

    They show two figures of the middle deviation or, where no deviation is known, four of the
    largest mean.
    """
    known = [sd for sd in sds if sd]
    if known:
        return min(5, max(0, 1 - math.floor(math.log10(median(known)))))
    largest = max((abs(m) for m in means), default=0)
    if not largest:
        return 0
    return min(4, max(0, 3 - math.floor(math.log10(largest))))


def signed(mean: float | None, sd: float | None, places: int) -> str:
    """Write a difference and its standard deviation, as -0.031 ± 0.004, and never -0.000."""
    if mean is None:
        return NONE
    return _with_deviation(f"{round(mean, places) + 0.0:+.{places}f}", sd, f".{places}f")


def change(value: float | None) -> str:
    """Write a fraction as a percentage with its sign, as +3.1 %; no change is 0.0 %."""
    if value is None:
        return NONE
    rounded = round(100 * value, 1)
    return f"{rounded:+,.1f} %" if rounded else "0.0 %"


def probability(value: float | None) -> str:
    """Write a p value, as 0.43, 0.031 and <0.001."""
    if value is not None and value < 0.001:
        return "<0.001"
    if value is not None and value < 0.0995:
        return f"{value:.3f}"
    return _number(value, ".2f")


def ratio(value: float) -> str:
    """Write a factor, with one decimal more near 1: 0.50x and 1.010x."""
    form = ".3f" if abs(value - 1) < 0.1 else ".2f"
    return f"{value:{form}}\N{MULTIPLICATION SIGN}"


def listed(names: Sequence[str]) -> str:
    """Write names as a, b and c; of more than eight, seven and how many more there are."""
    shown = list(names)
    if len(shown) > 8:
        shown[7:] = [f"{len(shown) - 7} more"]
    return " and ".join(part for part in (", ".join(shown[:-1]), shown[-1]) if part)


def plural(number: int, word: str) -> str:
    """Write a number of things, as 1 client and 4 clients."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def _number(value: float | None, form: str, unit: str = "") -> str:
    """Write a number in a format of Python's, and its unit; None is a dash."""
    return NONE if value is None else f"{value:{form}}{unit}"


def _with_deviation(mean: str, sd: float | None, form: str) -> str:
    """Add ± and the deviation to a mean that is known."""
    if mean == NONE or sd is None:
        return mean
    return f"{mean} {PLUS_MINUS} {sd:{form}}"
