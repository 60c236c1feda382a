"""What a federation's round takes over the training in it: four devices and their server on this
machine, with TLS and keys, as `make federation` makes them.

    python benchmarks/round.py [--rounds 6] [--steps 2] [--base mini] [--sums] [--out FILE]

--sums: with secure aggregation, whose rounds have two more small exchanges.

A round is over when it is committed. What it takes over its training is its time less that of the
client that trained longest in it, on its own clock. The first round is left out, in which devices
load the base and prepare their text. CPU seconds are those of all processes beside the trainers:
the SuperLink's, and those of gateway, ServerApp, SuperNodes, the command that follows the run, and
whatever these start.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

DEMO = Path(__file__).resolve().parent.parent / "scripts" / "federation_demo.py"
CONFIG = """
rounds = {rounds}
[base]
name = "{base}"
[client]
steps = {steps}
batch_size = 2
router_every = {steps}
router_steps = 1
[evaluation]
every = 0
keep = "last"
[participation]
deadline = 600
min_clients = 4
[options]
attention = "mean"
[privacy]
secure_aggregation = {sums}
"""
CLIENTS = ("french", "german", "italian", "dutch")
LOOK = 0.01  # seconds between looks at the run folder
TRAINER = "trainer_main"


def main() -> None:
    """Print a line for each round."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--base", default="mini")
    parser.add_argument("--sums", action="store_true")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="comigs-round-") as scratch:
        seen = list(rounds(Path(scratch), options))
    over = [line["over"] for line in seen]
    heads = ("round", "seconds", "training", "over it", "SuperLink's CPU s", "other CPU s", "load")
    table = Table(*heads)
    for line in seen:
        table.add_row(*(f"{value:.4g}" for value in line.values()))
    Console().print(table)
    print(f"over the training: median {statistics.median(over):.2f} s, most {max(over):.2f} s")
    if options.out is not None:
        options.out.write_text(json.dumps(seen, indent=1) + "\n", encoding="utf-8")


def rounds(scratch: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield what each round took, from the second on, as its figures by name."""
    entries = "".join(f'[[clients]]\nname = "{name}"\n' for name in CLIENTS)
    config = scratch / "config.toml"
    # The exchange after the last round measures models; it is begun here, and not waited for.
    sums = str(options.sums).lower()
    given = {"rounds": options.rounds, "steps": options.steps, "base": options.base, "sums": sums}
    config.write_text(CONFIG.format(**given) + entries, encoding="utf-8")
    words = [sys.executable, str(DEMO), str(scratch / "federation"), str(config)]
    demo = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    try:
        run, before, began, used = scratch / "federation" / "run", 0, 0.0, (0.0, 0.0)
        while before < options.rounds and demo.poll() is None:
            time.sleep(LOOK)
            if (round := committed(run)) == before:
                continue
            now, cpu = time.perf_counter(), cpu_beside_trainers(scratch)
            if before:
                trained = longest_training(run, round)
                yield {
                    "round": round,
                    "seconds": now - began,
                    "trained": trained,
                    "over": now - began - trained,
                    "superlink": cpu[0] - used[0],
                    "rest": cpu[1] - used[1],
                    "load": os.getloadavg()[0],
                }
            before, began, used = round, now, cpu
    finally:
        demo.send_signal(signal.SIGINT)
        demo.wait()


def committed(run: Path) -> int:
    """Return the last round that is committed, 0 before the first."""
    checkpoint = run / "checkpoint.json"
    return int(json.loads(checkpoint.read_bytes())["round"]) if checkpoint.exists() else 0


def longest_training(run: Path, round: int) -> float:
    """Return the most seconds that a client was at work in a round."""
    lines = [json.loads(line) for line in (run / "timings.jsonl").read_text().splitlines()]
    return max(float(line["seconds"]) for line in lines if line["round"] == round)


def cpu_beside_trainers(folder: Path) -> tuple[float, float]:
    """Return the CPU seconds of the SuperLink, and those of all others that work in a folder but
    trainers, with the children that they have waited for.
    """
    superlink = rest = 0.0
    for process in psutil.process_iter(["cwd", "cmdline", "cpu_times"]):
        place, words = process.info["cwd"] or "", " ".join(process.info["cmdline"] or ())
        if not place.startswith(str(folder.resolve())) or TRAINER in words:
            continue
        used = process.info["cpu_times"]
        seconds = used.user + used.system + used.children_user + used.children_system
        if "flower-superlink" in words:
            superlink += seconds
        else:
            rest += seconds
    return superlink, rest


if __name__ == "__main__":
    main()
