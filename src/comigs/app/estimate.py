"""What a run will take, said before it starts: memory from its shapes, time from real steps of its
largest client.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import psutil
import torch

from comigs.bases.base import linear_size
from comigs.bases.load import Base
from comigs.client.evaluate import measure
from comigs.client.state import new_train_state
from comigs.client.steps import MethodHooks, StepSettings, step
from comigs.config import Config, Split
from comigs.data.prepare import Outline
from comigs.errors import UserError
from comigs.experts.attach import Attachment
from comigs.experts.init import starting_tensors
from comigs.methods.method import Method
from comigs.seeds import generator
from comigs.server.rounds import task_of
from comigs.slots import Shapes
from comigs.text import size

TRAINED = 16  # bytes per scalar of a client: value, gradient and AdamW's two moments in float32
SCORE = 5  # times its own bytes that eager attention keeps of a score: 2.5 seen with mini, 7.5 with SmolLM2


@dataclass(frozen=True)
class Throughput:
    """How fast this machine is now: seconds of a local step, and of an evaluation per token."""

    step_seconds: float
    evaluation_seconds: float


def memory_needed(
    config: Config, base: Base, shapes: Mapping[str, Shapes], attachment: Attachment
) -> float:
    """Bytes at the peak of a run, however many clients it has: a base, a client and a batch on its
    way back.

    That for each worker on a CPU, for one on a GPU, where each has its own.
    """
    settings, length = config.client, config.data.sequence_length
    windows, model = settings.micro_batch_size or settings.batch_size, base.model.config
    bytes_each, mixture = torch.finfo(base.dtype).bits / 8, attachment.mixtures[0]
    width, inner = linear_size(getattr(mixture.mlp, base.architecture.up))
    kept = windows * length * (10 * width + (len(mixture.inputs) + 1) * inner) * bytes_each
    if model._attn_implementation == "eager":
        kept += windows * model.num_attention_heads * length**2 * SCORE * bytes_each
    held = sum(p.nbytes for p in base.model.parameters())
    if (
        base.device.type == "cpu"
    ):  # with Python, torch and transformers: 200 to 800 MB, as torch was built
        held = psutil.Process().memory_info().rss
    workers = config.workers if base.device.type == "cpu" else 1
    return float(
        workers * (held + TRAINED * _scalars(_largest(shapes)) + len(attachment.mixtures) * kept)
    )


def available_memory(device: torch.device) -> int:
    """Bytes that are free where the model is, with those that this process holds already."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return int(psutil.virtual_memory().available + psutil.Process().memory_info().rss)


def require_memory(needed: float, device: torch.device) -> None:
    """Raises UserError where a run would not fit."""
    if needed > (free := available_memory(device)):
        raise UserError(
            f"memory: this run needs about {size(needed)}, but {device} has {size(free)} free; set "
            "client.micro_batch_size or data.sequence_length lower, or take a smaller base"
        )


def measured_pace(
    config: Config, base: Base, shapes: Mapping[str, Shapes], attachment: Attachment
) -> Throughput:
    """Times a local step and an evaluation batch of the largest client, on tokens drawn at
    random.
    """
    start = starting_tensors(_largest(shapes), config.seed, "")
    train_state = new_train_state(
        {slot: tensor.to(base.device) for slot, tensor in start.items()}, config.client
    )
    attachment.bind(train_state.tensors)
    plan = StepSettings(config.client, lr=1e-6, router_lr=1e-6, total_steps=1, dtype=base.dtype)
    draw, vocabulary = generator(config.seed, "estimate"), base.encoder.vocabulary_size
    length = config.data.sequence_length
    trained, read = (
        draw.integers(vocabulary, size=(windows, length))
        for windows in (config.client.batch_size, config.evaluation.batch_size)
    )
    seconds = []
    for _ in range(2):  # the first one warms up
        began = time.perf_counter()
        step(attachment, train_state, plan, MethodHooks(), ("experts",), (trained, trained))
        halfway = time.perf_counter()
        measure(attachment, [(read, read)], base.dtype)
        seconds.append((halfway - began, (time.perf_counter() - halfway) / read.size))
    attachment.unbind()
    return Throughput(*seconds[1])


def run_seconds(
    config: Config,
    method: Method,
    pace: Throughput,
    outlines: Mapping[str, Outline],
    tokens_per_byte: float,
) -> float:
    """Of all training and evaluation at that pace, a client at a time in each worker."""
    asked = config.participation.clients_per_round or len(config.clients)
    local_steps = config.rounds * config.client.steps
    phases = local_steps // config.client.router_every if method.schedule != "joint" else 0
    tokens = _mean_tokens(outlines, tokens_per_byte)
    total = asked * (local_steps + phases * config.client.router_steps) * pace.step_seconds
    for round in range(1, config.rounds + 2):
        task, is_last = task_of(config, round, base_known=round > 1), round > config.rounds
        splits = (*task.evaluate, *task.evaluate_base)
        total += (
            (len(config.clients) if is_last else asked)
            * sum(tokens[s] for s in splits)
            * pace.evaluation_seconds
        )
    return total / min(config.workers, asked)


def _mean_tokens(outlines: Mapping[str, Outline], tokens_per_byte: float) -> dict[Split, float]:
    """Of a client's split."""
    sizes: dict[Split, float] = {"train": 0.0, "valid": 0.0, "test": 0.0}
    for split in sizes:
        total = sum(
            text.num_bytes for outline in outlines.values() for text in getattr(outline, split)
        )
        sizes[split] = total * tokens_per_byte / len(outlines)
    return sizes


def _largest(shapes: Mapping[str, Shapes]) -> Shapes:
    return max(shapes.values(), key=_scalars)


def _scalars(shapes: Shapes) -> int:
    return sum(math.prod(dims) for dims in shapes.values())
