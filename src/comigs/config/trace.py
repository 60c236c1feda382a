"""This module reads a trace: a CSV text that says when each client is there."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from functools import lru_cache

TRACE = ("client", "seconds", "available")  # the columns of a trace
Switches = tuple[tuple[float, bool], ...]  # from these seconds on: whether a client is there


@lru_cache(maxsize=8)
def read_trace(text: str) -> Mapping[str, Switches]:
    """Return client -> its switches. Raises ValueError with the line that is wrong.

    A text is read once, however many clients ask for it.
    """
    rows = csv.DictReader(io.StringIO(text), strict=True)
    try:
        return _switches(rows)
    except csv.Error as error:
        raise ValueError(f"line {rows.line_num}: not CSV: {error}") from None


def _switches(rows: csv.DictReader[str]) -> Mapping[str, Switches]:
    if tuple(rows.fieldnames or ()) != TRACE:
        raise ValueError(f"a trace begins with the line {','.join(TRACE)}")

    # Lines of several clients may stand among each other; each client's own must be in order.
    switches: dict[str, list[tuple[float, bool]]] = {}
    for row in rows:
        line = f"line {rows.line_num}"
        if None in row:
            raise ValueError(f"{line}: has more cells than the first line")
        try:
            seconds, available = float(row["seconds"]), bool(("0", "1").index(row["available"]))
        except (TypeError, ValueError):
            raise ValueError(f"{line}: seconds must be a number, available 0 or 1") from None
        of_client = switches.setdefault(row["client"], [])
        if not of_client and seconds != 0:
            raise ValueError(f"{line}: a client's first line must be of second 0")
        if of_client and not seconds > of_client[-1][0]:
            raise ValueError(f"{line}: not sorted: a client's seconds must rise")
        of_client.append((seconds, available))
    for client, of_client in switches.items():
        if len(of_client) == 1:
            raise ValueError(f"{client} has one line only: a trace ends with a client's last line")
    return {client: tuple(of_client) for client, of_client in switches.items()}
