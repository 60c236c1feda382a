"""How long it takes to start: `comigs --help`, and a run until its first step, with its text
prepared.

    python benchmarks/startup.py [--config configs/quickstart.toml] [--repeats 5] [--out FILE]

Each in a process of its own, from its start. Goals: 0.5 s and 10 s on two cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

HELP = "from comigs.app.cli import main; main()"
FIRST_STEP = """
import os, sys
from pathlib import Path
from comigs import load_config
from comigs.app import api

def report(event):
    if event.kind == "step":
        os._exit(0)

api.run(load_config(Path(sys.argv[1]), sys.argv[3:]), sys.argv[2], report)
"""
GOALS = {"comigs --help": 0.5, "first step": 10.0}


def seconds(*words: str) -> float:
    """Of a Python process with these arguments."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-P", *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/quickstart.toml")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    seen: dict[str, list[float]] = {name: [] for name in GOALS}
    with tempfile.TemporaryDirectory() as scratch:
        first = ("-c", FIRST_STEP, options.config)
        seconds(*first, f"{scratch}/prepare")  # text and figures of the base go into the cache
        for turn in range(options.repeats):
            seen["comigs --help"].append(seconds("-c", HELP, "--help"))
            seen["first step"].append(seconds(*first, f"{scratch}/{turn}"))
    table = Table("what", "seconds, median", "slowest", "goal")
    for name, taken in seen.items():
        table.add_row(
            name, f"{statistics.median(taken):.2f}", f"{max(taken):.2f}", f"{GOALS[name]:g}"
        )
    Console().print(table)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(seen, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
