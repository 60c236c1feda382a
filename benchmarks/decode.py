"""Answers of a client's own model beside the base's own, which `transformers` generates alone.

    python benchmarks/decode.py RUN --client NAME [--threads 1] [--turns 5] [--out FILE]

RUN: any run. Tokens a second of a greedy text of 128 tokens, and seconds to the first token after a
prompt of 512, in one process, taking turns; by the clock and by CPU time, of which a busy machine
changes less. `PersonalModel.stream` is what `comigs generate` does. The base is loaded a second
time, with torch's own attention (sdpa), as `from_pretrained` gives it.

Then the start: `comigs generate` from the start of its process to its first token, beside a process
that imports transformers and loads the base and its tokenizer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from comigs.app import api
from comigs.bases.load import load_base
from comigs.files import cache_folder

PROMPT, LONG_PROMPT, TOKENS = 16, 512, 128
LOAD = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
print("loaded")
"""
Seconds = tuple[float, float]  # by the clock, and of this process's CPU


def timed(work: Callable[[], Any]) -> Seconds:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def answers(options: argparse.Namespace) -> dict[str, list[Seconds]]:
    """Return the seconds of every turn, of ours and of the base, for both prompts."""
    folder = api.open_run(options.run)
    section = folder.config().base
    plain = load_base(section.model_copy(update={"attention": "sdpa"}))
    text = "The quick brown fox. " * LONG_PROMPT
    seen: dict[str, list[Seconds]] = {}
    with closing(api.open_personal_model(options.run, options.client)) as model:
        for one in (plain.model, model.model):
            one.generation_config.eos_token_id = None  # every text is as long

        def ask(length: int, tokens: int) -> None:
            ids = plain.tokenizer(text, return_tensors="pt")["input_ids"][:, :length]
            prompt = plain.tokenizer.decode(ids[0])
            given = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
            ways: dict[str, Callable[[], Any]] = {
                "base": lambda: plain.model.generate(ids, **given),
                "ours": lambda: list(model.stream(prompt, max_new_tokens=tokens)),
            }
            for name, way in ways.items():
                seen.setdefault(f"{name}, {length} + {tokens} tokens", []).append(timed(way))

        for turn in range(options.turns + 1):
            ask(LONG_PROMPT, 1)
            ask(PROMPT, TOKENS)
            if turn == 0:
                seen.clear()
    return seen


def first_output(*words: str) -> Seconds:
    """Return the seconds of a Python process from its start: until it writes something by the
    clock, and until it ends by CPU time.
    """
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, "-P", *words], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        wall = time.perf_counter() - start
        process.stdout.read()
        used = os.wait4(process.pid, 0)[2]
        process.returncode = 0
    return wall, used.ru_utime + used.ru_stime


def starts(options: argparse.Namespace) -> dict[str, list[Seconds]]:
    """Return the seconds of every turn until the first token, and until the base is loaded."""
    run, name = str(options.run), api.open_run(options.run).config().base.name
    kept = cache_folder() / "bases" / name
    loading = ("-c", LOAD, str(kept if kept.is_dir() else name))
    words = ("--prompt", "Once upon", "--max-new-tokens", "1")
    asking = ("-m", "comigs", "generate", run, "--client", options.client, *words)
    seen: dict[str, list[Seconds]] = {"base, start": [], "ours, start": []}
    for _ in range(options.turns):
        seen["base, start"].append(first_output(*loading))
        seen["ours, start"].append(first_output(*asking))
    return seen


def ratios(one: list[Seconds], other: list[Seconds]) -> list[str]:
    """Return the median over turns of one over the other, by the clock and by CPU time."""
    pairs = list(zip(one, other, strict=True))
    return [f"{statistics.median(a[kind] / b[kind] for a, b in pairs):.2f}" for kind in (0, 1)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--client", required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--only", choices=["answers", "start"])
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: dict[str, dict[str, list[Seconds]]] = {}
    if options.only != "start":
        found["answers"] = answers(options)
    if options.only != "answers":
        found["start"] = starts(options)
    show(found)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def show(found: dict[str, dict[str, list[Seconds]]]) -> None:
    """Print what was measured, each beside its goal."""
    table = Table("what", "goal", "by the clock", "by CPU time")
    if seen := found.get("answers"):
        writing, reading = f"{PROMPT} + {TOKENS} tokens", f"{LONG_PROMPT} + 1 tokens"
        speed = ratios(seen[f"base, {writing}"], seen[f"ours, {writing}"])
        first = ratios(seen[f"ours, {reading}"], seen[f"base, {reading}"])
        table.add_row("tokens a second, over the base", ">= 0.95", *speed)
        table.add_row("first token, over the base", "<= 1.1", *first)
    if started := found.get("start"):
        over = ratios(started["ours, start"], started["base, start"])
        table.add_row("start, over loading the base", "<= 1.5", *over)
    for name, turns in ((found.get("answers") or {}) | (found.get("start") or {})).items():
        medians = [statistics.median(turn[kind] for turn in turns) for kind in (0, 1)]
        table.add_row(name, "", *(f"{seconds:.3f} s" for seconds in medians))
    Console().print(table)


if __name__ == "__main__":
    main()
