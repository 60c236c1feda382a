"""What benchmarks/gpu.sh has measured so far becomes one table and one file, gpu.json.

python benchmarks/gpu_table.py MEASURED OUT
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def steps(folder: Path) -> dict[str, Any]:
    """Return each sitting of benchmarks/step.py by its file's name; turns are left out."""
    found = {}
    for file in sorted(folder.glob("step-*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        found[file.stem] = {key: content[key] for key in ("setting", "variants", "goals")}
    return found


def lines_of(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's file, of which the last may be cut short."""
    if not file.exists():
        return []
    whole = file.read_text(encoding="utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def rounds(folder: Path) -> dict[str, Any]:
    """Return of each run the speed of its rounds, whose clients train one after the other, and
    their peak memory.

    The first round is left out, as a GPU chooses its kernels there, and the exchange at the end,
    which only measures.
    """
    found = {}
    for run in sorted(folder.glob("run-*")):
        tokens = {}
        for line in lines_of(run / "metrics.jsonl"):
            if line["kind"] == "train" and line["round"] > 1:
                tokens[line["round"], line["client"]] = line["trained_tokens"]
        timings = [
            line
            for line in lines_of(run / "timings.jsonl")
            if (line["round"], line["client"]) in tokens
        ]
        if not timings:
            continue
        seconds, number = sum(line["seconds"] for line in timings), len({r for r, _ in tokens})
        found[run.name] = {
            "clients": len(timings) // number,
            "seconds": seconds / number,
            "tokens_per_second": sum(tokens.values()) / seconds,
            "peak_bytes": max(line["peak_memory_bytes"] for line in timings),
        }
    return found


def main() -> None:
    measured, out = map(Path, sys.argv[1:])
    content = {"steps": steps(measured), "rounds": rounds(measured)}
    tests = measured / "tests.log"
    if tests.exists():
        said = re.findall(r"\d+ (?:passed|failed|error|skipped)[^\n]*", tests.read_text())
        content["tests"] = said[-1] if said else "no result"

    # the reference of a sitting is its first variant, which all ratios of the sitting are over
    table = Table(title=f"tests: {content.get('tests', 'not run')}")
    for column in ("variant", "tokens/s", "over the first", "share of limit", "peak MB"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for sitting in content["steps"].values():
        table.add_section()
        table.add_row(sitting["setting"], style="bold")
        for name, row in sitting["variants"].items():
            over = next(value for key, value in row.items() if key.startswith("over"))
            table.add_row(
                f"  {name}", f"{row['tokens_per_second']:,.0f}", f"{over:.2f}",
                f"{row['share_of_limit']:.0%}", f"{row['peak_bytes'] / 1e6:,.0f}",
            )  # fmt: skip
        for goal in sitting["goals"]:
            met = "met" if goal["ratio"] >= goal["goal"] else "missed"
            table.add_row(f"  {goal['variant']} over {goal['over']}, goal {goal['goal']}", met)
    table.add_section()
    for name, row in content["rounds"].items():
        table.add_row(
            f"{name}: {row['clients']} clients, {row['seconds']:.1f} s a round",
            f"{row['tokens_per_second']:,.0f}", "", "", f"{row['peak_bytes'] / 1e6:,.0f}",
        )  # fmt: skip
    Console(width=110).print(table)
    (out / "gpu.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
