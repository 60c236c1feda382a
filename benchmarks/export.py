"""What every export of a personal model weighs, is worth and how fast it writes: a table.

    python benchmarks/export.py RUN --client NAME --out FOLDER [--windows 40] [--tokens 64]

Perplexity is on the first windows of the client's test, the same for all. Folders are read by
transformers and PEFT, GGUF by llama.cpp (xllamacpp), both with one thread. Speed is greedy text,
batch 1, in tokens per second of this process's CPU time, so that other work on the machine counts
little; take the ratios. `merged q4_1` and `merged q4_0` are what `comigs export` refuses to make.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.llama_cpp import Model, llama_cpp

from comigs.app.api import open_run
from comigs.app.export import export, opened_for_export
from comigs.data.batches import evaluation_windows
from comigs.personal.export import source as sources
from comigs.personal.export.export import size_of
from comigs.personal.export.gguf_file import write_gguf
from comigs.personal.export.source import Source, windows_of
from comigs.personal.export.standard import standard_model
from comigs.personal.model import PersonalModel

PROMPT = "Le système"
Window = tuple[list[int], list[int]]
EXPORTS = [
    ("transformers", "float32"), ("transformers", "bfloat16"), ("peft", "float32"),
    ("flat", "float32"), ("gguf", "float32"), ("gguf", "float16"), ("gguf", "bfloat16"),
    ("gguf", "q8_0"),
]  # fmt: skip
REFUSED = ["q4_1", "q4_0"]
BASES = ["q8_0", "q5_1", "q4_1", "q4_0"]


def perplexity(logits: Callable[[list[int]], torch.Tensor], windows: Sequence[Window]) -> float:
    """Of whatever gives the logits (L, V) of a window."""
    nats, tokens = 0.0, 0
    for inputs, targets in windows:
        found = F.cross_entropy(logits(inputs), torch.tensor(targets), reduction="sum")
        nats, tokens = nats + float(found), tokens + len(targets)
    return math.exp(nats / tokens)


def of_torch(model: Any) -> Callable[[list[int]], torch.Tensor]:
    """The logits of a transformers model."""

    def logits(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([ids]), use_cache=False).logits[0].float()  # type: ignore[no-any-return]

    return logits


def torch_speed(model: Any, ids: list[int], count: int) -> float:
    """Tokens per CPU second of transformers' own generate."""
    settings = {"do_sample": False, "min_new_tokens": count, "pad_token_id": 0}
    with torch.no_grad():
        model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False, pad_token_id=0)
        start = time.process_time()
        model.generate(torch.tensor([ids]), max_new_tokens=count, **settings)
    return count / (time.process_time() - start)


SERVER = """
import sys, time, xllamacpp
settings = xllamacpp.CommonParams()
settings.model.path, prompt, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
settings.n_ctx, settings.n_parallel = 512, 1
settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in sys.argv[4:]]
server = xllamacpp.Server(settings)
request = {"prompt": prompt, "temperature": 0, "ignore_eos": True}
server.handle_completions({**request, "max_tokens": 4})
start = time.process_time()
said = server.handle_completions({**request, "max_tokens": count})
seconds = time.process_time() - start
assert said["usage"]["completion_tokens"] == count, said
print(count / seconds)
"""


def llama_cpp_speed(path: Path, adapter: Path | None, prompt: str, count: int) -> float:
    """Tokens per CPU second of xllamacpp's server, with its own defaults but one thread."""
    words = [str(path), prompt, str(count)]
    if adapter is not None:
        words.append(str(adapter))
    done = subprocess.run(
        [sys.executable, "-c", SERVER, *words], capture_output=True, text=True, check=True
    )
    return float(done.stdout.splitlines()[-1])


class Table:
    """Rows as they come, on the screen and in a JSON file."""

    def __init__(self, ours: float) -> None:
        self.ours = ours
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, size: int | None, perplexity: float, speed: float | None) -> None:
        """One more row; size in bytes, speed in tokens per CPU second."""
        row = {
            "name": name,
            "bytes": size,
            "perplexity": perplexity,
            "tokens_per_cpu_second": speed,
        }
        self.rows.append(row)
        print(self.line(row), flush=True)

    def line(self, row: dict[str, Any]) -> str:
        """A row in Markdown."""
        size, speed = row["bytes"], row["tokens_per_cpu_second"]
        cells = [
            row["name"],
            "" if size is None else f"{size / 1e6:,.1f}",
            f"{row['perplexity']:.4f}",
            f"{row['perplexity'] / self.ours - 1:+.3%}",
            "" if speed is None else f"{speed:.1f}",
        ]
        return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--client", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--valid-windows", type=int, default=sources.WINDOWS)
    parser.add_argument("--only", nargs="*", default=[], help="formats and types, as gguf-q8_0")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sources.WINDOWS = options.valid_windows
    folder = open_run(options.run)
    base, config, data = opened_for_export(folder, options.client)
    length = config.data.sequence_length
    windows = [
        (inputs[0].tolist(), targets[0].tolist())
        for inputs, targets in evaluation_windows(data.test, length, 1)
    ][: options.windows]
    with closing(PersonalModel(folder, options.client, base)) as model:
        ids = model.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
        ours = perplexity(of_torch(model.model), windows)
        table = Table(ours)
        facts = {
            "run": config.name, "client": options.client, "round": folder.checkpoint().round,
            "rounds": config.rounds, "commit": commit(),
            "tokens": sum(len(targets) for _, targets in windows),
            "generated": options.tokens, "valid_windows": options.valid_windows,
            "weights": spread_of(model, windows),
        }  # fmt: skip
        print("| format | MB | perplexity | against the run | tokens per CPU second |")
        print("|---|---|---|---|---|")
        with model.without_experts():
            speed = torch_speed(model.model, ids, options.tokens)
            table.add(
                "the base alone, ours", None, perplexity(of_torch(model.model), windows), speed
            )
        table.add("the run's own, ours", None, ours, torch_speed(model.model, ids, options.tokens))
        source = Source(folder, options.client, base, model, windows_of(data.valid, length))
        with tempfile.TemporaryDirectory() as scratch:
            for type in REFUSED:
                if not options.only or f"merged-{type}" in options.only:
                    refused(source, Path(scratch) / type, windows, table, options.tokens)
    with tempfile.TemporaryDirectory() as scratch:
        for to, type in EXPORTS:
            if options.only and f"{to}-{type}" not in options.only:
                continue
            out = Path(scratch) / f"{to}-{type}"
            done = export(options.run, options.client, to, out, type)
            print(*(f"<!-- {line} -->" for line in done.lines()), sep="\n")
            measure(options, out, (to, type), windows, table)
        shared(options, Path(scratch), windows, table)
    options.out.mkdir(parents=True, exist_ok=True)
    content = json.dumps({**facts, "rows": table.rows}, indent=1) + "\n"
    (options.out / "export.json").write_text(content, encoding="utf-8")


def commit() -> str:
    """The commit of this source."""
    words = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def spread_of(model: PersonalModel, windows: Sequence[Window]) -> dict[str, float]:
    """How much the router routes: deviation of the first expert's weight from token to token."""
    found = []
    for inputs, _ in windows[:8]:
        of_torch(model.model)(inputs)
        found.append(torch.stack([r.weights_TE[:, 0] for r in model.attachment.routings()]))
    weights_LT = torch.cat(found, dim=1)
    return {
        "mean_deviation_in_a_block": float(weights_LT.std(dim=1).mean()),
        "largest_deviation_in_a_block": float(weights_LT.std(dim=1).max()),
    }


def measure(
    options: argparse.Namespace, out: Path, kind: tuple[str, str], windows: Sequence[Window],
    table: Table,
) -> None:  # fmt: skip
    """Measure one export in the program that it is for."""
    to, type = kind
    if to == "gguf":
        (path,) = out.glob("*.gguf")
        in_llama_cpp(f"gguf {type}", (path, None), windows, table, options.tokens)
        return
    if to == "transformers":
        model = AutoModelForCausalLM.from_pretrained(out, dtype=getattr(torch, type)).eval()
        speed = torch_speed(model, [1, 2, 3], options.tokens)
        value = perplexity(of_torch(model), windows)
        table.add(f"transformers {type}", size_of(out), value, speed)
        return
    if to == "flat":
        from peft import PeftModel

        folder = open_run(options.run)
        base, _, _ = opened_for_export(folder, options.client)
        adapted = PeftModel.from_pretrained(base.model, out).eval()
        speed = torch_speed(adapted, [1, 2, 3], options.tokens)
        table.add("flat, in PEFT", size_of(out), perplexity(of_torch(adapted), windows), speed)
        return
    from comigs.personal.export.formats import peft

    folder = open_run(options.run)
    base, _, _ = opened_for_export(folder, options.client)
    with closing(PersonalModel(folder, options.client, base)) as own:
        source = Source(folder, options.client, base, own, [])
        with peft.read(source, out) as mixed:
            table.add("peft, mixed again", size_of(out), perplexity(of_torch(mixed), windows), None)


def in_llama_cpp(
    name: str, files: tuple[Path, Path | None], windows: Sequence[Window], table: Table, count: int
) -> None:
    """Measure a GGUF, and an adapter on it, in llama.cpp."""
    path, adapter = files
    model: Model
    with llama_cpp(path, adapter) as model:
        value = perplexity(model.logits, windows)
    size = path.stat().st_size
    if adapter is not None:
        size += adapter.stat().st_size
    table.add(name, size, value, llama_cpp_speed(path, adapter, PROMPT, count))


def shared(
    options: argparse.Namespace, scratch: Path, windows: Sequence[Window], table: Table
) -> None:
    """The on-device format: an adapter in float16 on a base of each type."""
    adapter = scratch / "adapter.gguf"
    export(options.run, options.client, "gguf-adapter", adapter)
    megabytes = adapter.stat().st_size / 1e6
    for type in BASES:
        if options.only and f"gguf-base-{type}" not in options.only:
            continue
        base = scratch / f"base-{type}.gguf"
        export(options.run, options.client, "gguf-base", base, type)
        name = f"gguf-base {type} + gguf-adapter ({megabytes:.1f} MB)"
        in_llama_cpp(name, (base, adapter), windows, table, options.tokens)


def refused(
    source: Source, path: Path, windows: Sequence[Window], table: Table, count: int
) -> None:
    """What a merged model in few bits would be worth; path is named after its type."""
    write_gguf(path, standard_model(source), source.base.tokenizer, path.name, "refused")
    in_llama_cpp(f"merged {path.name} (refused)", (path, None), windows, table, count)


if __name__ == "__main__":
    main()
