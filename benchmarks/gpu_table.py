"""What benchmarks/gpu.sh left in a folder becomes one table and one file, gpu.json.

python benchmarks/gpu_table.py FOLDER
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


def rounds(folder: Path) -> dict[str, Any]:
    """Return of each run the speed of its clients, one after the other, and their peak memory.

    The first round is left out: a GPU chooses its kernels there.
    """
    found = {}
    for run in sorted(folder.glob("run-*/timings.jsonl")):
        lines = [json.loads(line) for line in run.read_text(encoding="utf-8").splitlines()]
        trained = [line for line in lines if line["client"] and line["round"] > 1]
        seconds = sum(line["seconds"] for line in trained)
        tokens = sum(line["seconds"] * line["tokens_per_second"] for line in trained)
        found[run.parent.name] = {
            "clients": len(trained),
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "peak_bytes": max(line["peak_memory_bytes"] for line in trained),
        }
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    content = {"steps": steps(folder), "rounds": rounds(folder)}
    tests = folder / "tests.log"
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
    table.add_section()
    for name, row in content["rounds"].items():
        table.add_row(
            f"{name}: {row['clients']} clients, {row['seconds']:.1f} s a round",
            f"{row['tokens_per_second']:,.0f}", "", "", f"{row['peak_bytes'] / 1e6:,.0f}",
        )  # fmt: skip
    Console(width=110).print(table)
    (folder / "gpu.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
