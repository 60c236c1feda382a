"""What clients in all cost, when as many as ever train in a round: start-up, seconds a round, peak
memory.

    python benchmarks/scale.py [--base mini] [--clients 10 100 1000] [--per-round 8] [--rounds 3]
    [--conditions configs/conditions/phones.toml] [--out scale.json]

Every number of clients is a run of its own, in a process of its own, that does what `comigs run`
does. Text: passages of the bundled Debian FAQ; a line of its own in front of each makes no two
documents the same. Start-up is from reading the config to the first step; a round has its
exchanges, its merge and its commit. The last exchange, in which everybody is measured, is told
apart: it grows with the clients, as it must; --rounds-only leaves it out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import count, cycle, islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

LANGUAGES = ("fr", "de", "it", "nl")
PASSAGES = {
    "train": (3, 900),
    "valid": (1, 900),
    "test": (1, 150),
}  # split -> documents, characters of each
CONFIG = """\
rounds = {rounds}
[base]
name = "{base}"
threads = {threads}
device = "cpu"
[data]
cache = "cache"
sequence_length = 64
[client]
steps = 2
batch_size = 2
router_every = 2
router_steps = 1
[evaluation]
every = 0
keep = "last"
[participation]
clients_per_round = {per_round}
[options]
probe_windows = 2
"""
CLIENT = """\
[[clients]]
name = "{name}"
text = {{train = "{name}.train.jsonl", valid = "{name}.valid.jsonl", test = "{name}.test.jsonl"}}
"""


def write_clients(folder: Path, options: argparse.Namespace, clients: int) -> Path:
    """A config of that many clients, and their text."""
    from comigs.data.sources import open_source

    pools = [
        cycle([d.text for d in open_source(f"debian-faq:{language}", folder)])
        for language in LANGUAGES
    ]
    config = [CONFIG.format(**{**vars(options), "per_round": min(options.per_round, clients)})]
    for number, pool in zip(range(clients), cycle(pools), strict=False):
        name, pages = f"client-{number:04d}", count(1)
        for split, (documents, length) in PASSAGES.items():
            with (folder / f"{name}.{split}.jsonl").open("w", encoding="utf-8") as file:
                for text, page in zip(islice(pool, documents), pages, strict=False):
                    file.write(json.dumps({"text": f"{name}, page {page}\n{text[:length]}"}) + "\n")
        config.append(CLIENT.format(name=name))
    if options.conditions is not None:
        config.insert(1, f'[conditions]\nfile = "{options.conditions.resolve()}"\n')
    path = folder / "scale.toml"
    path.write_text("".join(config), encoding="utf-8")
    return path


def measure(path: Path, rounds_only: bool) -> dict[str, Any]:
    """One run of this config: seconds and bytes."""
    from comigs import load_config
    from comigs.app import api
    from comigs.errors import Stopped
    from comigs.processes import peak_memory
    from comigs.runs.json_lines import read_timings
    from comigs.runs.metrics import Event, Train

    began = time.perf_counter()
    marks: dict[str, list[float]] = {}

    def report(event: Event) -> None:
        marks.setdefault(event.kind, []).append(time.perf_counter() - began)
        if rounds_only and event.kind == "server" and event.round == config.rounds:
            raise KeyboardInterrupt

    config = load_config(path)
    try:
        folder = api.run(config, path.parent / "run", report)
    except Stopped:
        folder = api.open_run(path.parent / "run")
    ended, peak = time.perf_counter() - began, peak_memory()
    first, rounds = marks["step"][0], marks["server"]
    timings = folder.path / "timings.jsonl"
    trained = [
        line
        for line in read_timings(timings.read_bytes(), str(timings))
        if line.tokens_per_second is not None
    ]
    return {
        "clients": len(folder.config().clients),
        "start_up_seconds": first,
        "round_seconds": [
            now - before for before, now in zip([first, *rounds], rounds, strict=False)
        ],
        "work_seconds": [
            sum(t.seconds for t in trained if t.round == r + 1) for r in range(len(rounds))
        ],
        "last_exchange_seconds": None if rounds_only else ended - rounds[-1],
        "peak_round_bytes": max(line.peak_memory_bytes for line in trained),
        "peak_bytes": peak,
        "parameters": max(
            line.trained_parameters for line in folder.metrics() if isinstance(line, Train)
        ),
    }


def in_its_own_process(options: argparse.Namespace, clients: int) -> dict[str, Any]:
    """`measure` in a process that has seen no other run."""
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        path = write_clients(Path(scratch), options, clients)
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        done = subprocess.run(
            [
                sys.executable,
                __file__,
                "--measure",
                path.name,
                *["--rounds-only"] * options.rounds_only,
            ],
            cwd=scratch,
            env=environment,
            check=True,
            stdout=subprocess.PIPE,
        )
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def table_of(options: argparse.Namespace, results: list[dict[str, Any]]) -> Table:
    table = Table(
        title=f"{options.base}, {options.per_round} clients a round, {options.threads} thread(s)"
    )
    columns = (
        "clients",
        "start-up s",
        "s a round",
        "of it at work",
        "last exchange s",
        "peak MB in rounds",
        "peak MB",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for r in results:
        round, work = statistics.median(r["round_seconds"]), statistics.median(r["work_seconds"])
        last = r["last_exchange_seconds"]
        table.add_row(
            f"{r['clients']:,}",
            f"{r['start_up_seconds']:.1f}",
            f"{round:.2f}",
            f"{work / round:.0%}",
            "-" if last is None else f"{last:.1f}",
            f"{r['peak_round_bytes'] / 1e6:,.0f}",
            f"{r['peak_bytes'] / 1e6:,.0f}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="mini")
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--per-round", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--rounds-only", action="store_true", help="without the last exchange, which asks everybody"
    )
    parser.add_argument(
        "--scratch",
        type=Path,
        help="where the runs are made; default: the system's temporary folder",
    )
    parser.add_argument("--conditions", type=Path, help="simulated devices, as a run's")
    parser.add_argument("--out", type=Path, default=Path("scale.json"))
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.measure, options.rounds_only)))
        return
    results = [in_its_own_process(options, clients) for clients in options.clients]
    settings = {key: getattr(options, key) for key in ("base", "per_round", "rounds", "threads")}
    versions = {name: version(name) for name in ("comigs", "torch", "transformers", "safetensors")}
    versions |= {"python": platform.python_version()}
    found = {
        "settings": settings,
        "versions": versions,
        "machine": platform.platform(),
        "results": results,
    }
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    Console(width=110).print(table_of(options, results))


if __name__ == "__main__":
    main()
