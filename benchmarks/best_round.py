"""What keeping the best round gains, from runs that measured valid and test in several rounds.

    python benchmarks/best_round.py results/overfit

A row for each run: mean test perplexity of the clients' models of the last round, of the round in
which each one's valid was lowest, and of that in which its test was lowest, which no way of
choosing a round can beat; and how many clients end above the base.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table

from comigs.experiments.csv_file import Row
from comigs.experiments.packed import read_packed
from comigs.experiments.run_data import RunData

VALID, TEST = "valid_perplexity", "test_perplexity"


def main() -> None:
    """Print the table of a folder of packed runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    table = Table("run", "base", "last", "lowest valid", "lowest test", "above the base")
    for run in read_packed(parser.parse_args().folder):
        table.add_row(*row_of(run))
    Console(width=110).print(table)


def row_of(run: RunData) -> list[str]:
    """Return the cells of one run."""
    # Round 0 is the untouched base, which no client can choose.
    measured: dict[str, dict[int, Row]] = {}
    for row in run.rounds:
        if row["client"] is not None and row[VALID] is not None and row[TEST] is not None:
            measured.setdefault(row["client"], {})[row["round"]] = row
    base = {client: rounds.pop(0)[TEST] for client, rounds in measured.items()}

    chosen = {
        "last": tests(measured, lambda row: -row["round"]),
        "valid": tests(measured, lambda row: row[VALID]),
        "test": tests(measured, lambda row: row[TEST]),
    }
    above = [sum(of[client] > base[client] for client in base) for of in chosen.values()]
    means = [f"{fmean(of.values()):.1f}" for of in chosen.values()]
    return [run.folder.as_posix(), f"{fmean(base.values()):.1f}", *means, f"{above[0]}, {above[1]}"]


def tests(
    measured: Mapping[str, Mapping[int, Row]], lowest: Callable[[Row], float]
) -> dict[str, float]:
    """Return each client's test perplexity in the round that is `lowest`, of equals the first."""
    return {client: min(rows.values(), key=lowest)[TEST] for client, rows in measured.items()}


if __name__ == "__main__":
    main()
