"""This module says what a client's work takes before any of it is done: memory and time.

The memory follows from shapes, the time from real steps on the machine that would do the work.
"""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from comigs.bases import attention
from comigs.bases.base import linear_size
from comigs.bases.load import Base
from comigs.client.evaluate import measure
from comigs.client.loss import largest_chunk
from comigs.client.shared_part import is_shared, learns_at_home
from comigs.client.state import TrainState, new_train_state
from comigs.client.steps import MethodHooks, NonFiniteLoss, StepSettings, step
from comigs.config import Config, Split
from comigs.data.batches import Batch
from comigs.errors import UserError
from comigs.experts.attach import Attachment
from comigs.experts.hidden_torch import CHUNK_ELSEWHERE
from comigs.experts.init import starting_tensors
from comigs.methods.loading import load_method
from comigs.methods.method import Method
from comigs.methods.readers import Choice
from comigs.privacy.budget import batch_of
from comigs.seeds import generator
from comigs.slots import Shapes, Slot, experts_of

# Bytes per scalar of a client in float32: value, gradient, AdamW's two moments, and the copy that
# experts below each other are; of what is not trained, the value alone; of a round that is kept, a
# copy of either.
TRAINED, FROZEN, KEPT = 20, 4, 4
# Of what a private client sends: a copy with two moments, and in a step a gradient, its sum, and
# that of one document.
SHARED = 24
COPIED = 8  # of each further copy of a generalist under a specialist, its own gradient too
# Times the bytes that training keeps by which a process grows: glibc's heap has holes. By itself
# it is 1.6 to 2.5 times (SmolLM2-135M's shape, 2 to 8 x 128); where large blocks are freed at once,
# as with base.memory, 1.3 to 1.5.
HEAP, FREED = 2.5, 1.5
SCORE = 5  # times its own bytes that eager attention keeps of a score: 2.5 (mini) to 7.5 (SmolLM2)
TOKEN = 24  # bytes of a token of a batch: the window as it is drawn, input and target
BY_DOCUMENT = 2  # times the seconds of windows that are trained one by one (docs/performance.md)
LOW = 8  # bytes of each of a token's products with an A: as it comes, and scaled, in float32


@dataclass(frozen=True)
class Throughput:
    """A throughput says how fast this machine is now.

    step_seconds: of a local step. evaluation_seconds: of an evaluation, per token.
    """

    step_seconds: float
    evaluation_seconds: float


def memory_needed(
    config: Config,
    base: Base,
    shapes: Mapping[str, Shapes],
    attachment: Attachment,
    held: float | None = None,
) -> float:
    """Return the bytes at the peak of a run, however many clients it has.

    They are a base, a client and a batch on its way back: for each worker on a CPU, for one on a
    GPU, where each worker has its own. held: bytes of the base and of all else that is there
    already; None: as it is now.
    """
    # the backward pass keeps the activations of a batch in each block, and its attention scores
    own, blocks = _largest(shapes), len(attachment.mixtures)
    length, in_training = config.data.sequence_length, windows_at_once(config)
    trained = training_bytes(config, base, attachment, in_training)
    copies = _copies(own)
    ranks = sum(dims[0] * copies[slot] for slot, dims in own.items() if slot.matrix == "A")
    trained += LOW * in_training * length * ranks

    # what only measures keeps one block at a time
    measured_windows = config.evaluation.batch_size
    measured = block_activations(config, base, attachment, measured_windows)
    measured += LOW * measured_windows * length * ranks / blocks

    # at the head a chunk of logits, and they alone, are there
    vocabulary = base.model.config.vocab_size
    logits = min(largest_chunk(base.device), in_training * length * vocabulary)
    head = logits * torch.finfo(base.dtype).bits / 8
    # elsewhere they are there in float32, too, and buffers of a chunk of a block's hidden layer
    parts = {slot.part for slot in own if slot.role in ("generalist", "specialist", "rest")}
    experts = max(1, len(attachment.experts_of(sorted(parts))))
    most = max(in_training, measured_windows) * length
    elsewhere = 4 * logits + hidden_buffers(attachment, most, experts)

    # on a CPU Python, torch and transformers count too: 200 to 800 MB, as torch was built
    workers, on_cpu = 1, base.device.type == "cpu"
    if held is None:
        held = sum(tensor.nbytes for tensor in (*base.model.parameters(), *base.model.buffers()))
        if on_cpu:
            held = psutil.Process().memory_info().rss
    if on_cpu:
        workers, elsewhere = config.workers, 0
    method = load_method(config)
    client, kept = 0, KEPT if config.evaluation.keep == "best" else 0
    for slot, dims in own.items():
        each = FROZEN if slot.is_frozen else TRAINED
        private = SHARED if config.privacy.by_document and is_shared(method, slot) else 0
        client += math.prod(dims) * (kept + each + private + COPIED * (copies[slot] - 1))
    passing = head + elsewhere + max(trained, measured)
    return float(workers * (held + client + batch_bytes(config) + passing))


def hidden_buffers(attachment: Attachment, tokens: int, experts: int) -> int:
    """Return the bytes of the buffers in which the hidden layer of a block's experts is computed on
    any other device than a CPU (experts/hidden_torch.py).
    """
    mixture, most = attachment.mixtures[0], CHUNK_ELSEWHERE
    products, inner = len(mixture.inputs), linear_size(_up(attachment))[1]
    of_experts = min(most, experts * tokens * inner) * (3 + products)
    return 4 * (of_experts + min(most // experts, tokens * inner) * products)


def _copies(own: Shapes) -> dict[Slot, int]:
    """Return how often each tensor is among a client's experts: a generalist under each specialist.

    What is part of no expert is there once.
    """
    experts = experts_of(sorted({slot.part for slot in own}))
    times = Counter(part for parts in experts for part in parts)
    return {slot: max(1, times[slot.part]) for slot in own}


def windows_at_once(config: Config) -> int:
    """Return how many windows a step of a config has in memory at once."""
    whole = config.client.batch_size
    return min(config.client.micro_batch_size or whole, whole)


def training_bytes(config: Config, base: Base, attachment: Attachment, windows: int) -> float:
    """Return the bytes that a forward pass over so many windows keeps, without its LoRA."""
    block, blocks = block_activations(config, base, attachment, windows), len(attachment.mixtures)
    if not config.base.recompute:
        return blocks * block
    width, _ = linear_size(_up(attachment))
    tokens = windows * config.data.sequence_length
    return blocks * tokens * width * base.dtype.itemsize + 2 * block


def block_activations(config: Config, base: Base, attachment: Attachment, windows: int) -> float:
    """Return the bytes that one block's pass over so many windows keeps, without its LoRA."""
    length, model, mixture = config.data.sequence_length, base.model.config, attachment.mixtures[0]
    bytes_each = torch.finfo(base.dtype).bits / 8
    width, inner = linear_size(_up(attachment))
    tokens, heads = windows * length, attachment.attention[0]
    if model._attn_implementation == attention.NAME and heads.keys() >= {"q", "k", "v"}:
        # what csrc keeps: what norms read and make, heads as they were turned, attention's result
        q, k, v = (linear_size(heads[site].linear)[1] for site in ("q", "k", "v"))
        each = 4 * width + 2 * q + k + v + len(mixture.inputs) * inner
        is_freed = config.base.memory is not None and sys.platform == "linux"
        return tokens * each * bytes_each * (FREED if is_freed else HEAP)
    kept = tokens * (10 * width + (len(mixture.inputs) + 1) * inner) * bytes_each
    if model._attn_implementation == "eager":
        kept += windows * model.num_attention_heads * length**2 * SCORE * bytes_each
    return float(kept)


def _up(attachment: Attachment) -> Any:
    """Return the linear that leads into the first block's hidden layer."""
    return getattr(attachment.mixtures[0].mlp, attachment.architecture.up)


def batch_bytes(config: Config) -> float:
    """Return the bytes of the largest batch's tokens."""
    windows = max(config.client.batch_size, config.evaluation.batch_size)
    return TOKEN * max(windows, load_method(config).probe) * config.data.sequence_length


def available_memory(device: torch.device) -> int:
    """Return the bytes that are free where the model is, with those that this process holds."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return int(psutil.virtual_memory().available + psutil.Process().memory_info().rss)


def bind_new_client(
    config: Config, base: Base, shapes: Mapping[str, Shapes], attachment: Attachment
) -> tuple[TrainState, StepSettings]:
    """Bind a new client with the shapes of the largest, whose steps are to be timed.

    Its rate is low: what it learns is thrown away.
    """
    start = starting_tensors(_largest(shapes), config.seed, "")
    tensors = {slot: tensor.to(base.device) for slot, tensor in start.items()}
    state = new_train_state(tensors, config.client)
    attachment.bind(state.tensors)
    settings = StepSettings(config.client, lr=1e-6, router_lr=1e-6, total_steps=1, dtype=base.dtype)
    return state, settings


def measured_throughput(
    config: Config, base: Base, shapes: Mapping[str, Shapes], attachment: Attachment
) -> Throughput:
    """Time a local step and an evaluation batch of the largest client, on random tokens.

    Raises UserError where even a client that is new has no finite loss.
    """
    train_state, settings = bind_new_client(config, base, shapes, attachment)
    draw, vocabulary = generator(config.seed, "estimate"), base.encoder.vocabulary_size
    length = config.data.sequence_length
    trained = draw.integers(vocabulary, size=(config.client.batch_size, length))
    read = draw.integers(vocabulary, size=(config.evaluation.batch_size, length))

    # the first time warms up
    for _ in range(2):
        began = time.perf_counter()
        try:
            step(
                attachment,
                train_state,
                settings,
                MethodHooks(),
                ("experts",),
                Batch(trained, trained),
            )
        except NonFiniteLoss as error:
            raise UserError(
                f"client: {error} before anything is learnt; lower experts.alpha, "
                "client.balance_coef or client.weight_decay"
            ) from None
        halfway = time.perf_counter()
        measure(attachment, [Batch(read, read)], base.dtype)
        ended = time.perf_counter()
    attachment.unbind()
    return Throughput(halfway - began, (ended - halfway) / read.size)


def training_steps(
    config: Config, method: Method, slots: Collection[Slot], local: int, phases: int
) -> float:
    """Return as how many local steps of the batch all training of a client counts.

    slots: of its tensors. local: its local steps. phases: of the router, where it has one.
    """
    steps = 0.0
    if config.privacy.by_document:
        steps += local * BY_DOCUMENT * batch_of(config) / config.client.batch_size
        # A method may train other tensors in every other round.
        if not any(learns_at_home(method, slot, n) for slot in slots for n in (1, 2)):
            return steps
    has_router = Choice(config, method, "in-process").has_router
    routing = phases * config.client.router_steps * (has_router and method.schedule != "joint")
    return steps + local + routing


def tokens_read(
    config: Config, method: Method, asked: Iterable[Split], tokens: Mapping[Split, float], end: bool
) -> float:
    """Return how many tokens a client reads in an exchange without learning from them, at most.

    asked: the splits to evaluate. tokens: of each split. end: whether it is the last exchange.
    """
    # What is weighed is measured as well: a download, and the model at the end.
    read = sum(tokens[split] for split in asked)
    if method.mix is not None:
        read += method.looks * method.probe * config.data.sequence_length
    finishing = method.last_looks * tokens["valid"]
    if end:
        read += finishing
    # The round that is kept may be an earlier one than that which is measured anyway; it is
    # finished as well then, and both are compared.
    if end and config.evaluation.keep == "best":
        read += tokens["test"] + finishing
        if method.finish is not None:
            read += tokens["valid"]
    return read


def num_scalars(shapes: Shapes) -> int:
    """Return how many numbers tensors of these shapes hold."""
    return sum(math.prod(dims) for dims in shapes.values())


def _largest(shapes: Mapping[str, Shapes]) -> Shapes:
    """Return the shapes of the largest client."""
    return max(shapes.values(), key=num_scalars)
