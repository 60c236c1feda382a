"""Train steps and evaluations are timed side by side: ours, plain peft LoRA, a naive mixture, and
the frozen base alone.

    python benchmarks/step.py [--base mini] [--batch 8] [--length 128] [--repeats 7]
                              [--dtype bfloat16] [--device cuda] [--together]
                              [--only TEXT...] [--out FILE]

A  peft LoRA of rank 8E on all attention and MLP linears: as many trained parameters as E experts
   of rank 8
B  a naive mixture: every expert is a full MLP forward pass, as research code does it
C  ours, with K of E experts per token
D  the frozen base alone: forward, and forward with backward to its input, a bound that no LoRA
   method can beat

Every variant runs in its own process, so that its peak memory is its own. The processes take turns
step by step, so that noise of the machine meets all alike. As many take turns at once as fit into
the free memory: where not all fit, variants of equal E sit together, the reference (the first
variant) sits in every sitting, and ratios across sittings are taken through it. Only ratios travel
between machines; each is a median of ratios within a turn.

The machine's limit is what a large matrix product reaches, here and now; a variant's share of it
counts only the operations that a step of the frozen base needs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional

from comigs.bases.load import Base, load_base
from comigs.client.evaluate import measure
from comigs.client.loss import autocast
from comigs.client.state import new_train_state
from comigs.client.steps import MethodHooks, StepSettings, step
from comigs.config import BaseSection, ClientSection, ExpertShape, ExpertsSection
from comigs.data.batches import Batch
from comigs.experts.attach import Attachment
from comigs.experts.init import starting_tensors
from comigs.experts.mixture import Mixture
from comigs.processes import peak_memory
from comigs.runs.environment import environment

RANK = 8
MARGIN = 1.15  # free memory that a new variant must leave beyond the largest one's peak
Run = Callable[[Any, Any], object]
GOALS = [  # train tokens per second of one over those of another, at least
    ("C E=2 K=2", "A rank 16", 1.0),
    ("C E=4 K=2", "A rank 32", 0.9),
    ("C E=8 K=2", "A rank 64", 0.8),
    ("C E=2 K=2", "B E=2", 1.35),
    ("C E=4 K=2", "B E=4", 2.0),
    ("C E=8 K=8", "B E=8", 3.0),
    ("evaluate: C E=2 K=2", "evaluate: D", 0.95),
]


def forward(base: Base) -> Run:
    """The base's own forward pass and loss, without gradients."""

    def run(x: torch.Tensor, y: torch.Tensor) -> None:
        with torch.no_grad(), autocast(base.dtype, x.device):
            logits = base.model(x, use_cache=False).logits
            torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), y.flatten())

    return run


def forward_and_backward(base: Base) -> Run:
    """The same, and backward to the input of the first block."""

    def run(x: torch.Tensor, y: torch.Tensor) -> None:
        embedded = base.model.get_input_embeddings()(x).detach().requires_grad_()
        with autocast(base.dtype, x.device):
            hidden = base.model.base_model(
                inputs_embeds=embedded, use_cache=False
            ).last_hidden_state
            logits = base.model.get_output_embeddings()(hidden)
            torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), y.flatten()).backward()

    return run


def peft_lora(rank: int) -> Callable[[Base], Run]:
    """Plain LoRA on all attention and MLP linears."""

    def build(base: Base) -> Run:
        from peft import LoraConfig, get_peft_model

        a = base.architecture
        names = [
            *a.mlp_linears().values(),
            *(path.rpartition(".")[2] for path in a.attention.values()),
        ]
        model = get_peft_model(
            base.model, LoraConfig(r=rank, target_modules=sorted(set(names)), use_rslora=True)
        )
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], fused=True
        )

        def run(x: torch.Tensor, y: torch.Tensor) -> None:
            with autocast(base.dtype, x.device):
                logits = model(x, use_cache=False).logits
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), y.flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    return build


def naive_forward(mixture: Mixture, x: torch.Tensor) -> torch.Tensor:
    """Every expert a full MLP forward pass."""
    x_TD = x.reshape(-1, x.shape[-1])
    weights_TE = mixture.routing_weights(x).to(x.dtype).expand(len(x_TD), -1)
    y_TD = torch.zeros_like(x_TD)
    act = getattr(mixture.mlp, mixture.architecture.activation)
    for e, expert in enumerate(mixture.bound.experts):

        def adapted(site: str, h: torch.Tensor, expert: Any = expert) -> torch.Tensor:
            y = mixture.frozen_linear(site, h)
            for lora in expert.loras:
                low, B = functional.linear(h, lora.A[site].to(h.dtype)), lora.scale * lora.B[site]
                y = y + functional.linear(low, B.to(h.dtype))
            return y

        up = adapted("up", x_TD)
        hidden = act(adapted("gate", x_TD)) * up if "gate" in mixture.inputs else act(up)
        y_TD = y_TD + weights_TE[:, e, None] * adapted("down", hidden)
    return y_TD.view(x.shape)


def mixture(
    experts: int, top_k: int, naive: bool = False, evaluate: bool = False
) -> Callable[[Base], Run]:
    """Our own step, or evaluation."""

    def build(base: Base) -> Run:
        if naive:
            Mixture.forward = naive_forward  # type: ignore[method-assign]
        attachment = Attachment(
            base.model, base.architecture, ExpertsSection(top_k=top_k, strength="each")
        )
        shape = ExpertShape(
            generalists=1,
            specialists=experts - 1,
            rank=RANK,
            specialist_rank=RANK,
            attention_rank=experts * RANK,
        )
        settings = ClientSection()
        start = starting_tensors(attachment.slot_shapes(shape, True), 0, "bench")
        train_state = new_train_state(
            {slot: tensor.to(base.device) for slot, tensor in start.items()}, settings
        )
        attachment.bind(train_state.tensors)
        plan = StepSettings(settings, lr=1e-4, router_lr=1e-4, total_steps=1000, dtype=base.dtype)

        def run(x: torch.Tensor, y: torch.Tensor) -> None:
            batch = Batch(x.cpu().numpy(), y.cpu().numpy())
            if evaluate:
                measure(attachment, [batch], base.dtype)
            else:
                step(attachment, train_state, plan, MethodHooks(), ("experts",), batch)

        return run

    return build


VARIANTS: dict[str, Callable[[Base], Run]] = {
    "A rank 16": peft_lora(16),
    "A rank 32": peft_lora(32),
    "A rank 64": peft_lora(64),
    "B E=2": mixture(2, 2, naive=True),
    "B E=4": mixture(4, 2, naive=True),
    "B E=8": mixture(8, 8, naive=True),
    "C E=1 K=1": mixture(1, 1),
    "C E=2 K=2": mixture(2, 2),
    "C E=4 K=2": mixture(4, 2),
    "C E=4 K=4": mixture(4, 4),
    "C E=8 K=2": mixture(8, 2),
    "C E=8 K=8": mixture(8, 8),
    "D forward and backward": forward_and_backward,
    "evaluate: D": forward,
    "evaluate: C E=2 K=2": mixture(2, 2, evaluate=True),
    "evaluate: C E=8 K=2": mixture(8, 2, evaluate=True),
}


def load(options: argparse.Namespace, attention: str = "auto") -> Base:
    return load_base(
        BaseSection(
            name=options.base, dtype=options.dtype, device=options.device, attention=attention
        )
    )


def as_others_have_it(options: argparse.Namespace) -> Base:
    """The base as `transformers` computes it, in the way that is fastest there in training."""
    return load(options, "eager" if options.device == "cpu" else "sdpa")


def sample(options: argparse.Namespace, base: Base) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    x = torch.randint(
        base.encoder.vocabulary_size, (options.batch, options.length), generator=random
    ).to(base.device)
    return x, x.roll(-1, dims=1)


def finish(base: Base) -> None:
    """Wait for what a GPU still has to do."""
    if base.device.type == "cuda":
        torch.cuda.synchronize()


def worker(name: str, options: argparse.Namespace, pipe: Any) -> None:
    """Tell the peak memory after a warm-up, time one step whenever asked, and end with the peak."""
    if options.threads:
        torch.set_num_threads(options.threads)
    base = load(options) if "C E" in name else as_others_have_it(options)
    run = VARIANTS[name](base)
    x, y = sample(options, base)
    run(x, y)
    finish(base)
    pipe.send(peak(base))
    while pipe.recv():
        start = time.perf_counter()
        run(x, y)
        finish(base)
        pipe.send(time.perf_counter() - start)
    pipe.send(peak(base))


def limit(name: str, options: argparse.Namespace, pipe: Any) -> None:
    """Time a large matrix product whenever asked, and send operations per second."""
    if options.threads:
        torch.set_num_threads(options.threads)
    base = load(options)
    size = 2048 if options.device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=base.device).to(base.dtype) for _ in range(2))
    a @ b
    pipe.send(peak(base))
    while pipe.recv():
        times = []
        for _ in range(3):
            start = time.perf_counter()
            a @ b
            finish(base)
            times.append(time.perf_counter() - start)
        pipe.send(2 * size**3 / min(times))
    pipe.send(0)


def peak(base: Base) -> int:
    """Return the most bytes that this process has held, on the device where it computes."""
    if base.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return peak_memory()


def free_memory(options: argparse.Namespace) -> int:
    """Return the bytes that further processes may take, on the device where they compute."""
    if options.device.startswith("cuda"):
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available


def experts_of(name: str) -> int:
    """Return how many experts a variant's parameters are enough for, which says how large it is."""
    rank, experts = re.search(r"rank (\d+)", name), re.search(r"E=(\d+)", name)
    if rank:
        return int(rank[1]) // RANK
    return int(experts[1]) if experts else 0


class Sitting:
    """A sitting is the processes that take turns at one time: the limit, and some variants."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.pipes: dict[str, Any] = {}
        self.largest = 0
        self._seat({"limit": limit})

    def _seat(self, targets: dict[str, Callable[..., None]]) -> None:
        """Start these processes together, and wait until each has warmed up."""
        context = multiprocessing.get_context("spawn")
        for name, target in targets.items():
            self.pipes[name], theirs = context.Pipe()
            context.Process(target=target, args=(name, self.options, theirs), daemon=True).start()
            # On two cores two that warm up at once would be slower than one after the other.
            if not self.options.together:
                self.largest = max(self.largest, self.pipes[name].recv())
        if self.options.together:
            peaks = [self.pipes[name].recv() for name in targets]
            self.largest = max(self.largest, *peaks)

    def takes(self, names: list[str]) -> bool:
        """Return whether these variants were seated, or there was no memory for all of them.

        Variants come from the largest on, so no new one is larger than the largest seated so far.
        """
        new = [name for name in dict.fromkeys(names) if name not in self.pipes]
        has_room = free_memory(self.options) > MARGIN * self.largest * len(new)
        if len(self.pipes) > 1 and not has_room:
            return False
        self._seat(dict.fromkeys(new, worker))
        return True

    def times(self, repeats: int) -> dict[str, list[float]]:
        """Let all take turns, and return each one's seconds; of the limit, operations a second."""
        seen: dict[str, list[float]] = {name: [] for name in self.pipes}
        for _ in range(repeats):
            for name, pipe in self.pipes.items():
                pipe.send(True)
                seen[name].append(pipe.recv())
        return seen

    def end(self) -> dict[str, int]:
        """End all processes, and return each one's peak memory in bytes."""
        peaks = {}
        for name, pipe in self.pipes.items():
            pipe.send(False)
            peaks[name] = pipe.recv()
        return peaks


def operations(base: Base, tokens: int, length: int, train: bool) -> float:
    """Return the operations of a step or an evaluation of the frozen base.

    They are two for each parameter and token, attention's, and in training as many backward.
    """
    config, embedding = base.model.config, base.model.get_input_embeddings().weight.numel()
    matrices = sum(p.numel() for p in base.model.parameters() if p.dim() == 2)
    if base.model.get_output_embeddings().weight is not base.model.get_input_embeddings().weight:
        matrices -= embedding  # looked up, not multiplied
    positions = sum(p.numel() for n, p in base.model.named_parameters() if "wpe" in n)
    attention = (
        2 * 2 * config.num_hidden_layers * length * config.hidden_size
    )  # scores and mix, per token
    return (2 if train else 1) * tokens * (2 * (matrices - positions) + attention)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="mini")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of each process; processes take turns")
    parser.add_argument(
        "--together",
        action="store_true",
        help="start all variants at once, without asking whether memory is there for all of them",
    )
    parser.add_argument(
        "--only", nargs="+", metavar="TEXT", help="variants whose name holds one of these"
    )
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    names = [n for n in VARIANTS if not options.only or any(text in n for text in options.only)]
    if not names:
        parser.error(f"--only: no variant holds {options.only}; there are: {', '.join(VARIANTS)}")
    sittings, peaks = [], {}
    waiting = sorted(names, key=experts_of, reverse=True)
    groups = [list(group) for _, group in groupby(waiting, key=experts_of)]
    if options.together:
        groups = [waiting]
    while groups:
        # The reference comes last: it is none of the largest, after which others are not larger.
        sitting = Sitting(options)
        while groups and sitting.takes([*groups[0], names[0]]):
            groups.pop(0)
        seated = [name for name in sitting.pipes if name != "limit"]
        Console(stderr=True).print(
            f"{len(seated)} of {len(names)} variants take turns: {', '.join(seated)}", style="dim"
        )
        sittings.append(sitting.times(options.repeats))
        peaks |= sitting.end()
    write(options, sittings, peaks, names)


def ratio(sittings: list[dict[str, list[float]]], one: str, other: str, reference: str) -> float:
    """Return how many times as fast one variant is as another: the median over turns.

    Where the two never sat together, the reference that sat with each stands between them.
    """
    for seen in sittings:
        if one in seen and other in seen:
            return statistics.median(b / a for a, b in zip(seen[one], seen[other], strict=True))
    over_reference = ratio(sittings, one, reference, reference)
    return over_reference / ratio(sittings, other, reference, reference)


def write(
    options: argparse.Namespace,
    sittings: list[dict[str, list[float]]],
    peaks: dict[str, int],
    names: list[str],
) -> None:
    """Print the table of variants and the goals, and write the JSON file."""
    base, tokens, first = load(options), options.batch * options.length, names[0]
    dtype = str(base.dtype).removeprefix("torch.")
    size = f"{options.base}, {options.batch} x {options.length} tokens, {dtype}, {base.device}"
    top = statistics.median(limit for seen in sittings for limit in seen["limit"])
    together = "all at once" if len(sittings) == 1 else f"{len(sittings)} sittings"
    table = Table(title=f"{size}; limit {top / 1e9:,.0f} GFLOP/s; {together}")
    for column in ("variant", "s", "tokens/s", f"over {first}", "share of limit", "peak MB"):
        table.add_column(column, justify="left" if column == "variant" else "right")

    rows: dict[str, dict[str, float]] = {}
    for name in names:
        seen = next(seen for seen in sittings if name in seen)
        needed = operations(base, tokens, options.length, train=not name.startswith("evaluate"))
        turns = zip(seen[name], seen["limit"], strict=True)
        seconds, over = statistics.median(seen[name]), ratio(sittings, name, first, first)
        share = statistics.median(needed / s / limit for s, limit in turns)
        rows[name] = {
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            f"over {first}": over,
            "share_of_limit": share,
            "peak_bytes": peaks[name],
        }
        table.add_row(
            name, f"{seconds:.3f}", f"{tokens / seconds:,.0f}", f"{over:.2f}", f"{share:.0%}",
            f"{peaks[name] / 1e6:,.0f}",
        )  # fmt: skip
    console, goals = Console(width=100), []
    console.print(table)
    for one, other, least in GOALS:
        if one in names and other in names:
            got = ratio(sittings, one, other, first)
            goals.append({"variant": one, "over": other, "goal": least, "ratio": got})
            verdict = "" if got >= least else ": missed"
            console.print(f"{one} over {other}: {got:.2f}, goal {least}{verdict}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        made_with = {k: v for k, v in environment(base, {}).items() if k not in ("command", "data")}
        content = {
            "setting": size,
            "variants": rows,
            "goals": goals,
            "sittings": sittings,
            "environment": made_with,
        }
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
