"""What every export of a personal model weighs, is worth and how fast it writes: a table.

    python benchmarks/export.py RUN --client NAME --out FOLDER [--windows 40] [--tokens 64]

Perplexity is on windows of the client's test, spread evenly over it, the same for all; beside it
stands how far it is from the run's own, with the standard error of that difference over the
windows. Folders are read by transformers and PEFT, GGUF by llama.cpp (xllamacpp), all with one
thread. Speed is greedy text, batch 1, in tokens per second of this process's CPU time, so that
other work on the machine counts little; take the ratios. `merged q4_1` and `merged q4_0` are what
`comigs export` refuses to make. FOLDER/export.json has the rows so far after each of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.llama_cpp import Model, llama_cpp

from comigs.app.api import open_run
from comigs.app.export import opened_for_export
from comigs.data.batches import evaluation_windows
from comigs.personal.export import source as sources
from comigs.personal.export.export import size_of, write_export
from comigs.personal.export.form import load_format
from comigs.personal.export.formats import peft
from comigs.personal.export.gguf_file import write_gguf
from comigs.personal.export.source import Source, windows_of
from comigs.personal.export.standard import standard_model
from comigs.personal.model import PersonalModel

PROMPT = "Le système"
Window = tuple[list[int], list[int]]
Logits = Callable[[list[int]], torch.Tensor]
ROWS = [
    "transformers-float32", "transformers-bfloat16", "gguf-float32", "gguf-float16",
    "gguf-bfloat16", "gguf-q8_0", "gguf-base-float16", "gguf-base-q8_0", "gguf-base-q5_1",
    "gguf-base-q4_1", "gguf-base-q4_0", "merged-q4_1", "merged-q4_0", "peft-float32",
    "flat-float32",
]  # fmt: skip


class Table:
    """Rows as they come, on the screen and in a JSON file."""

    def __init__(self, path: Path, facts: dict[str, Any], windows: Sequence[Window]) -> None:
        self.path = path
        self.facts = facts
        self.windows = windows
        self.own: list[float] = []  # nats of each window by the run's own model
        self.rows: list[dict[str, Any]] = []
        print("| format | MB | perplexity | against the run | tokens per CPU second |")
        print("|---|---|---|---|---|")

    def add(self, name: str, size: int | None, logits: Logits, speed: float | None) -> None:
        """Measure one more row; size in bytes, speed in tokens per CPU second."""
        nats = nats_of(logits, self.windows)
        self.own = self.own or nats
        # Windows are as long as each other, so that the mean of their means is that of all tokens.
        differences = [a - b for a, b in zip(nats, self.own, strict=True)]
        row = {
            "name": name,
            "bytes": size,
            "perplexity": float(np.exp(np.mean(nats))),
            "against_the_run": float(np.expm1(np.mean(differences))),
            "standard_error": statistics.stdev(differences) / len(differences) ** 0.5,
            "tokens_per_cpu_second": speed,
        }
        self.rows.append(row)
        print(line(row), flush=True)
        content = json.dumps({**self.facts, "rows": self.rows}, indent=1) + "\n"
        self.path.write_text(content, encoding="utf-8")


def line(row: dict[str, Any]) -> str:
    """A row in Markdown."""
    size, speed = row["bytes"], row["tokens_per_cpu_second"]
    cells = [
        row["name"],
        "" if size is None else f"{size / 1e6:,.1f}",
        f"{row['perplexity']:.4f}",
        f"{row['against_the_run']:+.3%} ± {row['standard_error']:.3%}",
        "" if speed is None else f"{speed:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def nats_of(logits: Logits, windows: Sequence[Window]) -> list[float]:
    """Mean nats per token of each window, by whatever gives its logits (L, V)."""
    return [float(F.cross_entropy(logits(x), torch.tensor(y))) for x, y in windows]


def of_torch(model: Any) -> Logits:
    """The logits of a transformers model."""

    def logits(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([ids]), use_cache=False).logits[0].float()  # type: ignore[no-any-return]

    return logits


def torch_speed(model: Any, ids: list[int], count: int) -> float:
    """Tokens per CPU second of transformers' own generate."""
    settings = {"do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        model.generate(torch.tensor([ids]), max_new_tokens=4, **settings)
        start = time.process_time()
        model.generate(torch.tensor([ids]), max_new_tokens=count, min_new_tokens=count, **settings)
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


class Bench:
    """Makes each export and measures it in the program that it is for."""

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self.scratch = scratch
        self.count = options.tokens
        folder = open_run(options.run)
        self.plain = lambda: opened_for_export(folder, options.client)[0]
        base, config, texts = opened_for_export(folder, options.client)
        data = texts.load(options.client)
        length = config.data.sequence_length
        self.model = PersonalModel(folder, options.client, base)
        self.source = Source(
            folder, options.client, base, self.model, windows_of(data.valid, length)
        )
        self.ids = self.model.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
        # What the table is measured on, and what one has to know of it.
        windows = spread(data.test, length, options.windows)
        facts = {
            "run": config.name, "client": options.client, "seed": config.seed,
            "round": folder.checkpoint().round, "rounds": config.rounds, "commit": commit(),
            "tokens": sum(len(targets) for _, targets in windows), "generated": options.tokens,
            "valid_windows": len(self.source.windows),
            "weights": routing_of(self.model, windows),
        }  # fmt: skip
        options.out.mkdir(parents=True, exist_ok=True)
        self.table = Table(options.out / "export.json", facts, windows)

    def ours(self) -> None:
        """Measure the run's own model and the base, both by us."""
        own = self.model.model
        self.table.add(
            "the run's own, ours", None, of_torch(own), torch_speed(own, self.ids, self.count)
        )
        with self.model.without_experts():
            speed = torch_speed(own, self.ids, self.count)
            self.table.add("the base alone, ours", None, of_torch(own), speed)

    def export(self, to: str, type: str) -> Path:
        """Export as `comigs export` does, and return the folder or file."""
        out = self.scratch / f"{to}-{type}"
        if to in ("gguf-base", "gguf-adapter"):
            out = out.with_suffix(".gguf")
        if not out.exists():
            done = write_export(self.source, (to, load_format(to), type), out)
            print(*(f"<!-- {line} -->" for line in done.lines()), sep="\n", flush=True)
        return out

    def gguf(self, type: str) -> None:
        """Measure a merged GGUF in llama.cpp."""
        (path,) = self.export("gguf", type).glob("*.gguf")
        self.in_llama_cpp(f"gguf {type}", path)

    def gguf_base(self, type: str) -> None:
        """Measure the on-device format in llama.cpp: an adapter in float16 on a base."""
        base, adapter = self.export("gguf-base", type), self.export("gguf-adapter", "float16")
        megabytes = adapter.stat().st_size / 1e6
        name = f"gguf-base {type} + gguf-adapter ({megabytes:.1f} MB)"
        self.in_llama_cpp(name, base, adapter)
        base.unlink()

    def merged(self, type: str) -> None:
        """Measure what a merged model in few bits would be worth."""
        path = self.scratch / f"merged-{type}.gguf"
        tokenizer = self.source.base.tokenizer
        write_gguf(path, standard_model(self.source), tokenizer, type, "refused")
        self.in_llama_cpp(f"merged {type} (refused)", path)

    def in_llama_cpp(self, name: str, path: Path, adapter: Path | None = None) -> None:
        """Measure a GGUF, and an adapter on it, in llama.cpp."""
        size = path.stat().st_size
        if adapter is not None:
            size += adapter.stat().st_size
        speed = llama_cpp_speed(path, adapter, PROMPT, self.count)
        model: Model
        with llama_cpp(path, adapter) as model:
            self.table.add(name, size, model.logits, speed)

    def transformers(self, type: str) -> None:
        """Measure a folder in transformers, in the type that it is stored in."""
        out = self.export("transformers", type)
        model = AutoModelForCausalLM.from_pretrained(out, dtype=getattr(torch, type)).eval()
        speed = torch_speed(model, self.ids, self.count)
        self.table.add(f"transformers {type}", size_of(out), of_torch(model), speed)

    def flat(self, type: str) -> None:
        """Measure the one LoRA in PEFT."""
        self.in_peft("flat, in PEFT", self.export("flat", type))

    def peft(self, type: str) -> None:
        """Measure the experts mixed as their folder says, and each expert alone in PEFT."""
        out = self.export("peft", type)
        with peft.read(self.source, out) as mixed:
            self.table.add("peft, mixed again by us", size_of(out), of_torch(mixed), None)
        for part in self.source.parts:
            name = peft.folder_of(part)
            self.in_peft(f"peft, {name} alone, in PEFT", out / name)

    def in_peft(self, name: str, folder: Path) -> None:
        """Measure one adapter on a base of its own."""
        adapted = PeftModel.from_pretrained(self.plain().model, folder).eval()
        speed = torch_speed(adapted, self.ids, self.count)
        self.table.add(name, size_of(folder), of_torch(adapted), speed)


def spread(stores: Any, length: int, count: int) -> list[Window]:
    """So many whole windows, spread evenly over these stores."""
    whole = [(x[0], y[0]) for x, y, _ in evaluation_windows(stores, length, 1) if x.size == length]
    at = np.linspace(0, len(whole) - 1, min(count, len(whole))).astype(int)
    return [(whole[i][0].tolist(), whole[i][1].tolist()) for i in at]


def commit() -> str:
    """The commit of this source."""
    words = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def routing_of(model: PersonalModel, windows: Sequence[Window]) -> dict[str, float]:
    """How much the router routes, by the first expert's weight in each block."""
    found = []
    for inputs, _ in windows[:8]:
        of_torch(model.model)(inputs)
        found.append(torch.stack([r.weights_TE[:, 0] for r in model.attachment.routings()]))
    weights_LT = torch.cat(found, dim=1)
    means_L, deviations_L = weights_LT.mean(dim=1), weights_LT.std(dim=1)
    return {
        "smallest_mean_of_a_block": float(means_L.min()),
        "largest_mean_of_a_block": float(means_L.max()),
        "mean_deviation_from_token_to_token": float(deviations_L.mean()),
        "largest_deviation_from_token_to_token": float(deviations_L.max()),
    }


def main() -> None:
    """Print the table and write it down."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--client", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--valid-windows", type=int, default=sources.WINDOWS)
    parser.add_argument("--only", nargs="*", default=ROWS, choices=ROWS, metavar="ROW")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sources.WINDOWS = options.valid_windows
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(options, Path(scratch))
        with closing(bench.model):
            bench.ours()
            for row in options.only:
                to, _, type = row.rpartition("-")
                getattr(bench, to.replace("-", "_"))(type)


if __name__ == "__main__":
    main()
