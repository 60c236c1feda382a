"""What benchmarks/gpu.sh measures on the day there is a GPU comes out as a table and a file."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from comigs.app import api
from tests.conftest import run_config

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
ROW = {"seconds": 0.5, "tokens_per_second": 2048.0, "share_of_limit": 0.4, "peak_bytes": 3_000_000}


def table_of(measured, out):
    """What gpu_table.py prints, and the file that it writes."""
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "gpu_table.py", measured, out],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((out / "gpu.json").read_text())


def test_a_finished_run_and_a_sitting_come_out_as_a_table_and_a_file(tmp_path):
    measured = tmp_path / "measured"
    api.run(run_config(tmp_path, rounds=2), measured / "run-tiny")
    variants = {"A rank 16": {**ROW, "over A rank 16": 1.0}}
    sitting = {"setting": "tiny, 8 x 128", "variants": variants, "goals": [], "sittings": []}
    (measured / "step-tiny-8.json").write_text(json.dumps(sitting))
    (measured / "tests.log").write_text("...\n9 passed in 3.21s\n")
    printed, content = table_of(measured, tmp_path)
    for words in ("9 passed", "A rank 16", "2,048", "40%", "run-tiny: 2 clients"):
        assert words in printed
    assert content["steps"]["step-tiny-8"]["variants"] == variants
    run = content["rounds"]["run-tiny"]
    metrics = (measured / "run-tiny/metrics.jsonl").read_text().splitlines()
    trained = [line for line in map(json.loads, metrics) if line["kind"] == "train"]
    tokens = sum(line["trained_tokens"] for line in trained if line["round"] == 2)
    assert tokens and run["tokens_per_second"] * run["seconds"] == pytest.approx(tokens)


def test_what_was_cut_short_still_comes_out(tmp_path):
    """Of a run that ended in its first round there is nothing to say."""
    run = tmp_path / "measured" / "run-tiny"
    run.mkdir(parents=True)
    (run / "timings.jsonl").write_text('{"round": 1, "client": "ada", "seconds": 2.0}\n')
    printed, content = table_of(run.parent, tmp_path)
    assert "tests: not run" in printed and content["rounds"] == {} and content["steps"] == {}


def test_all_stages_together_end_within_eight_minutes():
    script = (BENCHMARKS / "gpu.sh").read_text()
    limits = re.findall(r"^ *stage \"?(\S+) (\d+) ", script, re.MULTILINE)
    seconds = sum(int(limit) * (1 + ("base" in name)) for name, limit in limits)
    assert limits and seconds < 480
