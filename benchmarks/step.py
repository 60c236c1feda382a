"""Train steps side by side: ours against plain peft LoRA, a naive mixture and the frozen base alone.

    python benchmarks/step.py [--base mini] [--batch 8] [--length 128] [--repeats 7] [--dtype bfloat16]

Every variant runs in its own process (its peak memory is its own) and the processes take turns step by step, so that
noise of the machine meets all alike. Printed are medians and ratios to peft; only ratios travel between machines.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from comigs.bases.load import Base, load_base
from comigs.client.client import new_trainee
from comigs.client.loss import sum_cross_entropy
from comigs.client.steps import Plan, Rules, autocast, step
from comigs.config import BaseSection, ClientSection, ExpertShape, ExpertsSection
from comigs.experts.attach import Attachment
from comigs.experts.mixture import Mixture
from comigs.experts.start import starting_tensors
from comigs.process import peak_memory

RANK = 8


def frozen_base(base: Base) -> Callable[[Any, Any], None]:
    """Forward, and backward to the input of the first block: a bound no LoRA method can beat."""

    def run(x: torch.Tensor, y: torch.Tensor) -> None:
        embedded = base.model.get_input_embeddings()(x).detach().requires_grad_()
        with autocast(base.dtype, x.device):
            hidden = base.model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
            torch.nn.functional.cross_entropy(
                base.model.get_output_embeddings()(hidden).flatten(0, 1).float(), y.flatten()
            ).backward()

    return run


def peft_lora(base: Base) -> Callable[[Any, Any], None]:
    """Plain LoRA of rank 16 on all attention and MLP linears: as many trained parameters as two experts of rank 8."""
    from peft import LoraConfig, get_peft_model

    a = base.architecture
    names = [*a.mlp_linears().values(), *(path.rpartition(".")[2] for path in a.attention.values())]
    model = get_peft_model(base.model, LoraConfig(r=2 * RANK, target_modules=sorted(set(names)), use_rslora=True))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)

    def run(x: torch.Tensor, y: torch.Tensor) -> None:
        with autocast(base.dtype, x.device):
            loss = sum_cross_entropy(base.model, x, y) / y.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def naive_forward(mixture: Mixture, x: torch.Tensor) -> torch.Tensor:
    """Every expert a full MLP forward pass, as research code does."""
    x_TD = x.reshape(-1, x.shape[-1])
    weights_TE = mixture._routing_weights(x_TD).to(x.dtype).expand(len(x_TD), -1)
    y_TD = torch.zeros_like(x_TD)
    act = getattr(mixture.mlp, mixture.architecture.activation)
    for e, expert in enumerate(mixture.experts):

        def adapted(site: str, h: torch.Tensor, expert: Any = expert) -> torch.Tensor:
            low = torch.nn.functional.linear(h, expert.A[site].to(h.dtype))
            return mixture._frozen(site, h) + torch.nn.functional.linear(low, expert.scaled_b(site, h.dtype))

        up = adapted("up", x_TD)
        hidden = act(adapted("gate", x_TD)) * up if "gate" in mixture.inputs else act(up)
        y_TD = y_TD + weights_TE[:, e, None] * adapted("down", hidden)
    return y_TD.view(x.shape)


def mixture(base: Base, experts: int, naive: bool = False) -> Callable[[Any, Any], None]:
    """Our own step with this many experts, two of them used per token."""
    if naive:
        Mixture.forward = naive_forward  # type: ignore[method-assign]
    attachment = Attachment(base.model, base.architecture, ExpertsSection(top_k=min(2, experts), strength="each"))
    shape = ExpertShape(
        generalists=1, specialists=experts - 1, rank=RANK, specialist_rank=RANK, attention_rank=2 * RANK
    )
    settings = ClientSection()
    trainee = new_trainee(starting_tensors(attachment.slot_shapes(shape, True), 0, "bench"), settings)
    attachment.bind(trainee.tensors)
    plan = Plan(settings, lr=1e-4, router_lr=1e-4, total_steps=1000, dtype=base.dtype)

    def run(x: torch.Tensor, y: torch.Tensor) -> None:
        step(attachment, trainee, plan, ("experts",), (x.numpy(), y.numpy()), Rules())

    return run


VARIANTS: dict[str, Callable[[Base], Callable[[Any, Any], None]]] = {
    "peft LoRA, rank 16": peft_lora,
    "frozen base alone": frozen_base,
    "naive mixture, E=2": lambda base: mixture(base, 2, naive=True),
    "ours, E=1": lambda base: mixture(base, 1),
    "ours, E=2": lambda base: mixture(base, 2),
    "ours, E=4, K=2": lambda base: mixture(base, 4),
}


def worker(name: str, options: argparse.Namespace, pipe: Any) -> None:
    """Time one step whenever asked; at the end report the peak memory."""
    base = load_base(BaseSection(name=options.base, dtype=options.dtype, device="cpu"))
    run = VARIANTS[name](base)
    x = torch.randint(
        base.encoder.vocabulary_size, (options.batch, options.length), generator=torch.Generator().manual_seed(0)
    )
    y = x.roll(-1, dims=1)
    run(x, y)  # warm-up
    pipe.send(None)
    while pipe.recv():
        start = time.perf_counter()
        run(x, y)
        pipe.send(time.perf_counter() - start)
    pipe.send(peak_memory())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="mini")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for name in VARIANTS:
        pipes[name], theirs = context.Pipe()
        context.Process(target=worker, args=(name, options, theirs), daemon=True).start()
        pipes[name].recv()
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(options.repeats):
        for name, pipe in pipes.items():
            pipe.send(True)
            seconds[name].append(pipe.recv())
    size = f"{options.batch} x {options.length} tokens"
    table = Table(title=f"{options.base}, {size}, {options.dtype}, {torch.get_num_threads()} threads")
    for column in ("variant", "s/step", "tokens/s", "tokens/s over peft", "peak MB"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    tokens, reference = options.batch * options.length, statistics.median(next(iter(seconds.values())))
    for name, pipe in pipes.items():
        pipe.send(False)
        median = statistics.median(seconds[name])
        table.add_row(
            name, f"{median:.3f}", f"{tokens / median:,.0f}", f"{reference / median:.2f}", f"{pipe.recv() / 1e6:,.0f}"
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
