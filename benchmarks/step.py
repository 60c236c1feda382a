"""Train steps and evaluations are timed side by side: ours, plain peft LoRA, a naive mixture, and
the frozen base alone.

    python benchmarks/step.py [--base mini] [--batch 8] [--length 128] [--repeats 7]
                              [--dtype bfloat16] [--device cuda] [--together]
                              [--only NAME...] [--out FILE]

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
between machines; each is a median of ratios within a turn. The file of figures is written after
every turn.

The machine's limit is what a large matrix product reaches, here and now; a variant's share of it
counts only the operations that a step of the frozen base needs.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
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
Seen = dict[str, list[float]]  # of each process of a sitting, what it measured in turns
LIMIT = "limit"  # the process that times a large product, and tells what others need to know
GOALS = {  # by device, base and dtype: of 8 x 128, one's tokens a second over another's, at least
    ("cpu", "smollm2-135m", "bfloat16"): [
        ("C E=2 K=2", "A rank 16", 1.8),
        ("C E=8 K=2", "A rank 64", 1.7),
        ("C E=2 K=2", "B E=2", 2.0),
        ("C E=2 K=2", LIMIT, 0.4),
        ("evaluate: C E=2 K=2", "evaluate: D", 1.4),
    ],
    ("cpu", "smollm2-135m", "float32"): [("C E=2 K=2", "A rank 16", 1.1)],
    ("cpu", "mini", "bfloat16"): [("C E=2 K=2", "A rank 16", 2.0)],
    ("cuda", "", ""): [("C E=2 K=2", "A rank 16", 1.0), ("C E=8 K=2", "A rank 64", 0.8)],
}


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


@dataclass(frozen=True)
class Facts:
    """Facts are what a process that has the base tells the one that has not."""

    title: str
    dtype: str
    device: str
    train_operations: float
    evaluation_operations: float
    environment: dict[str, Any]


def facts_of(options: argparse.Namespace, base: Base) -> Facts:
    """Return what the table and the goals need to know of the base."""
    tokens = options.batch * options.length
    made_with = environment(base, {})
    return Facts(
        title=base.title,
        dtype=str(base.dtype).removeprefix("torch."),
        device=str(base.device),
        train_operations=operations(base, tokens, options.length, train=True),
        evaluation_operations=operations(base, tokens, options.length, train=False),
        environment={k: v for k, v in made_with.items() if k not in ("command", "data")},
    )


def worker(name: str, options: argparse.Namespace, pipe: Any) -> None:
    """Measure once whenever asked, the first time to warm up, and send the value and the peak
    memory: seconds of a step or, of the limit, operations a second.

    The limit begins with `Facts`. None instead of a value says that the memory is too small.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    own = name == LIMIT or "C E" in name
    base = load(options) if own else as_others_have_it(options)
    measured: Callable[[], float]
    if name == LIMIT:
        pipe.send(facts_of(options, base))
        measured = warm_up = large_product(base)
    else:
        run, (x, y) = VARIANTS[name](base), sample(options, base)
        measured, warm_up = timed_step(run, x, y, base), timed_step(run, x[:1], y[:1], base)
    # A GPU's kernels are loaded at the first step, which all may do side by side, with one window
    # each; the memory that it took is nobody's until a variant is seated.
    if options.together and base.device.type == "cuda":
        with suppress(RuntimeError):
            warm_up()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(base.device)
    while pipe.recv():
        try:
            pipe.send((measured(), peak(base)))
        except torch.OutOfMemoryError:
            pipe.send((None, peak(base)))


def timed_step(run: Run, x: torch.Tensor, y: torch.Tensor, base: Base) -> Callable[[], float]:
    """Return a function that runs a step and returns its seconds."""

    def measured() -> float:
        start = time.perf_counter()
        run(x, y)
        finish(base)
        return time.perf_counter() - start

    return measured


def large_product(base: Base) -> Callable[[], float]:
    """Return a function that times a large matrix product and returns operations a second."""
    size = 2048 if base.device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=base.device).to(base.dtype) for _ in range(2))

    def measured() -> float:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            a @ b
            finish(base)
            times.append(time.perf_counter() - start)
        return 2 * size**3 / min(times)

    return measured


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


class Processes:
    """Processes are started here, all at once or when they are wanted, and tell of the base."""

    def __init__(self, options: argparse.Namespace, names: list[str]) -> None:
        self.options, self._pipes = options, dict[str, Any]()
        # On two cores two that load at once would be slower than one after the other.
        if options.together:
            for name in (LIMIT, *names):
                self._pipes[name] = self._start(name)
        else:
            self._pipes[LIMIT] = self._start(LIMIT)
        self.facts: Facts = self._pipes[LIMIT].recv()

    def _start(self, name: str) -> Any:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        context.Process(target=worker, args=(name, self.options, theirs), daemon=True).start()
        theirs.close()  # else nobody would notice the end of the process
        return ours

    def take(self, name: str) -> Any:
        """Return the pipe to a process, which is started where it is not there."""
        return self._pipes.pop(name, None) or self._start(name)

    def keep(self, name: str, pipe: Any) -> None:
        """Take back a process that the next sitting wants, too."""
        self._pipes[name] = pipe


class Sitting:
    """A sitting is the processes that take turns at one time: the limit, and some variants."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.pipes: dict[str, Any] = {}
        self.peaks: dict[str, int] = {}
        self.seen: dict[str, list[float]] = {}
        self._seat([LIMIT])

    def _seat(self, names: list[str]) -> None:
        """Let these processes warm up one after the other; one that has no room is left out."""
        for name in names:
            pipe = self.processes.take(name)
            if self._ask(name, pipe) is None:
                Console(stderr=True).print(f"{name}: out of memory", style="red")
                pipe.send(False)
            else:
                self.pipes[name], self.seen[name] = pipe, []

    def _ask(self, name: str, pipe: Any) -> float | None:
        pipe.send(True)
        value, self.peaks[name] = pipe.recv()
        return value

    def takes(self, names: list[str]) -> bool:
        """Return whether these variants were seated, or there was no memory for all of them.

        Variants come from the largest on, so no new one is larger than the largest seated so far.
        """
        new = [name for name in dict.fromkeys(names) if name not in self.pipes]
        needed = MARGIN * max(self.peaks.values()) * len(new)
        if len(self.pipes) > 1 and free_memory(self.processes.options) < needed:
            return False
        self._seat(new)
        return True

    def turn(self) -> None:
        """Let each measure once."""
        for name, pipe in self.pipes.items():
            value = self._ask(name, pipe)
            # a GPU whose memory is nearly full may fail later; what it did before counts
            if value is not None:
                self.seen[name].append(value)

    def end(self, but: tuple[str, ...]) -> None:
        """End all processes but those that go on to the next sitting."""
        for name, pipe in self.pipes.items():
            if name in but:
                self.processes.keep(name, pipe)
            else:
                pipe.send(False)


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
        help="load the base in all processes at once, each on a core of its own",
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these variants, by their names")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    unknown = set(options.only or ()) - set(VARIANTS)
    if unknown:
        parser.error(f"--only: no variant is called {unknown}; there are: {', '.join(VARIANTS)}")

    # groups are of equal E, the largest first, so that later ones need no more memory
    names = [name for name in VARIANTS if not options.only or name in options.only]
    waiting = sorted(names, key=experts_of, reverse=True)
    groups = [list(group) for _, group in groupby(waiting, key=experts_of)]
    processes, sittings, peaks = Processes(options, waiting), list[Seen](), dict[str, int]()
    while groups:
        # The reference comes last: it is none of the largest, after which others are not larger.
        sitting = Sitting(processes)
        while groups and sitting.takes([*groups[0], names[0]]):
            groups.pop(0)
        seated = [name for name in sitting.pipes if name != LIMIT]
        Console(stderr=True).print(
            f"{len(seated)} of {len(names)} variants take turns: {', '.join(seated)}", style="dim"
        )
        sittings.append(sitting.seen)
        # Whoever ends this early has the figures of every turn that was whole.
        for _ in range(options.repeats):
            sitting.turn()
            peaks |= sitting.peaks
            content = content_of(options, processes.facts, sittings, peaks)
            if options.out:
                write(options.out, content)
        sitting.end(but=(LIMIT, names[0]) if groups else ())
    show(content, len(sittings))


def ratio(sittings: list[Seen], one: str, other: str, reference: str) -> float:
    """Return how many times as fast one variant is as another: the median over turns.

    Where the two never sat together, the reference that sat with each stands between them; it is
    not a number where that had no room.
    """
    for seen in sittings:
        if seen.get(one) and seen.get(other):
            return statistics.median(b / a for a, b in zip(seen[one], seen[other], strict=False))
    if other == reference:
        return math.nan
    over_reference = ratio(sittings, one, reference, reference)
    return over_reference / ratio(sittings, other, reference, reference)


def content_of(
    options: argparse.Namespace, facts: Facts, sittings: list[Seen], peaks: Mapping[str, int]
) -> dict[str, Any]:
    """Return the figures of all turns so far, as the file has them."""
    # a variant that had no room has none
    measured = {name for seen in sittings for name, values in seen.items() if values}
    names, rows = [name for name in VARIANTS if name in measured], dict[str, dict[str, float]]()
    first = next(iter(names), "")
    for name in names:
        seen = next(seen for seen in sittings if seen.get(name))
        evaluates = name.startswith("evaluate")
        needed = facts.evaluation_operations if evaluates else facts.train_operations
        turns = zip(seen[name], seen[LIMIT], strict=False)
        seconds = statistics.median(seen[name])
        rows[name] = {
            "seconds": seconds,
            "tokens_per_second": options.batch * options.length / seconds,
            f"over {first}": ratio(sittings, name, first, first),
            "share_of_limit": statistics.median(needed / s / limit for s, limit in turns),
            "peak_bytes": peaks[name],
        }
    goals = []
    for one, other, least in goals_of(facts):
        if one in rows and other in {*rows, LIMIT}:
            got = rows[one]["share_of_limit"]
            if other != LIMIT:
                got = ratio(sittings, one, other, first)
            if math.isnan(got):
                continue
            goals.append({"variant": one, "over": other, "goal": least, "ratio": got})
    size = f"{options.batch} x {options.length} tokens"
    return {
        "setting": f"{facts.title}, {size}, {facts.dtype}, {facts.device}",
        "variants": rows,
        "goals": goals,
        "sittings": sittings,
        "environment": facts.environment,
    }


def goals_of(facts: Facts) -> list[tuple[str, str, float]]:
    """Return what is asked of this base on this device."""
    for (device, base, dtype), goals in GOALS.items():
        if facts.device.startswith(device) and base in facts.title and dtype in facts.dtype:
            return goals
    return []


def write(file: Path, content: dict[str, Any]) -> None:
    """Write the figures in place of those of the turn before."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_suffix(".new")
    new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    new.replace(file)


def show(content: dict[str, Any], sittings: int) -> None:
    """Print the table of variants and the goals."""
    top = statistics.median(limit for seen in content["sittings"] for limit in seen[LIMIT])
    first, together = next(iter(content["variants"])), "all at once"
    if sittings > 1:
        together = f"{sittings} sittings"
    table = Table(title=f"{content['setting']}; limit {top / 1e9:,.0f} GFLOP/s; {together}")
    for column in ("variant", "s", "tokens/s", f"over {first}", "share of limit", "peak MB"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for name, row in content["variants"].items():
        table.add_row(
            name, f"{row['seconds']:.3f}", f"{row['tokens_per_second']:,.0f}",
            f"{row[f'over {first}']:.2f}", f"{row['share_of_limit']:.0%}",
            f"{row['peak_bytes'] / 1e6:,.0f}",
        )  # fmt: skip
    console = Console(width=100)
    console.print(table)
    for goal in content["goals"]:
        verdict = "" if goal["ratio"] >= goal["goal"] else ": missed"
        console.print(
            f"{goal['variant']} over {goal['over']}: {goal['ratio']:.2f}, "
            f"goal {goal['goal']}{verdict}"
        )


if __name__ == "__main__":
    main()
