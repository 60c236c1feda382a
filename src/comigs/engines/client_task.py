"""This module is what a client does when it is asked, on whichever machine it is: receive,
evaluate, train, send.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from comigs.client.best_round import BestRound
from comigs.client.client import Client
from comigs.client.evaluate import Measurement
from comigs.client.power import with_specialists
from comigs.client.round_log import RoundLog
from comigs.client.state import new_train_state
from comigs.config import Split
from comigs.data.sampling import Level
from comigs.methods.method import Download, Upload
from comigs.processes import peak_memory
from comigs.runs.metrics import ClientReport, Evaluation, Kept, Step, Timing, TrainReport
from comigs.server.protocol import Reply, Report, Task
from comigs.slots import Slot


def measure_base(client: Client, split: Split) -> Measurement:
    """Measure the base alone on a client's text."""
    return client.evaluate(split, untouched_base=True)


def run_task(
    client: Client,
    task: Task,
    download: Download,
    report: Report,
    base_evaluation: Callable[[Client, Split], Measurement] = measure_base,
    specialists: int | None = None,
) -> tuple[Client, Reply]:
    """Do one exchange at the client's end; return the client after it, and its reply.

    report: called with each step as it is done. base_evaluation: measures the base alone.
    specialists: with how many it trains from now on; None: with those it has.
    """
    start = time.perf_counter()
    metrics: list[ClientReport] = []
    for split in task.evaluate_base:
        metrics.append(evaluated(client, split, 0, base_evaluation(client, split), "base"))

    # What is evaluated is the model of the round before, with the merge of that round in it.
    client.receive(download, task.round)
    part = None if task.train else client.finish()
    measured: dict[Split, Evaluation] = {}
    for split in task.evaluate:
        result = client.evaluate(split)
        measured[split] = evaluated(client, split, task.round - 1, result, "personal", part)
        if client.best is not None and split == "valid":
            tensors, adopted = client.train_state.tensors, client.adopted_share
            client.best.offer(task.round - 1, result.nats_per_token, tensors, adopted)
    metrics += measured.values()
    if client.best is not None and client.best.round and not task.train:
        metrics.append(go_back(client, client.best, measured))

    # Where text is centralized, one client trains for all; the others come here, too.
    speed: float | None = None
    upload: Upload | None = None
    if task.train:
        client = with_specialists(client, specialists)
    if task.train and client.is_trainer:
        began, step = time.perf_counter(), 0

        def on_step(level: Level, nats: float) -> None:
            nonlocal step
            step += level == "experts"
            name, number = client.name, task.round
            report(Step(round=number, client=name, step=step, level=level, nats_per_token=nats))

        log = client.train(task.round, on_step, task.prior)
        upload = client.send(task.round)
        training = trained(client, task.round, log)
        metrics.append(training)
        speed = training.local_tokens / (time.perf_counter() - began)
    timing = Timing(
        round=task.round,
        client=client.name,
        tokens_per_second=speed,
        seconds=time.perf_counter() - start,
        peak_memory_bytes=_peak_memory(client.base.device),
    )
    length = client.config.data.sequence_length
    tokens = sum(store.num_learnt(length) for store in client.data.train)
    return client, Reply(upload, metrics, timing, tokens, task.round)


def unseen(download: Download, added: Mapping[Slot, int]) -> Download:
    """Return a download without the updates that a client has added already.

    added: how many ranks of each update that is. Raises LookupError where the download has fewer.
    """
    # Updates are stacked along the rank, oldest first, so what was added is cut off there.
    left: dict[Slot, Tensor] = {}
    for slot, tensor in download.items():
        seen, side = added.get(slot, 0), 0 if slot.matrix == "A" else 1
        if seen > tensor.shape[side]:
            raise LookupError(f"{slot} has fewer ranks than were added")
        if seen < tensor.shape[side]:
            left[slot] = tensor.narrow(side, seen, tensor.shape[side] - seen)
    return left


def added_ranks(download: Download) -> dict[Slot, int]:
    """Return how many ranks of each update a client has added with a download."""
    ranks = {}
    for slot, tensor in download.items():
        if slot.role == "update":
            ranks[slot] = tensor.shape[0 if slot.matrix == "A" else 1]
    return ranks


def go_back(client: Client, best: BestRound, last: Mapping[Split, Evaluation]) -> Kept:
    """Make the model of its best round the client's own, where that is better once it is finished;
    return the "kept" line of metrics.jsonl.

    last: what the model of the last round came to.
    """
    line, of_last, method = last["test"], client.train_state, client.method
    adopted = client.adopted_share
    if best.round != line.round:
        # It may be of a round in which the client had fewer specialists.
        own = {Slot.parse(n): t.clone() for n, t in best.tensors().items()}
        own = {slot: tensor.to(client.base.device) for slot, tensor in own.items()}
        client.train_state = new_train_state(own, client.config.client)
        client.adopted_share = best.adopted_share
        # The model of the last round was finished before it was measured; this one was not, and
        # valid may lose more by that (fdlora) than there was between the two.
        part = client.finish()
        limit = last["valid"].nats_per_token
        assert limit is not None, "a client measures its own model itself"
        if method.finish is None or client.evaluate("valid").nats_per_token < limit:
            result = client.evaluate("test")
            line = evaluated(client, "test", best.round, result, "personal", part)
        else:
            client.train_state, client.adopted_share = of_last, adopted
    return Kept(**line.model_dump(exclude={"kind"}))


def trained(client: Client, round: int, log: RoundLog) -> TrainReport:
    """Return the "train" line of metrics.jsonl."""
    # Routing weights are summed over tokens; a line has their means.
    shares_LE: list[list[float]] | None = None
    if log.share_sum_LE is not None:
        shares_LE = (log.share_sum_LE.double() / log.trained_tokens).tolist()
    return TrainReport(
        round=round,
        client=client.name,
        local_steps=log.local_steps,
        router_steps=len(log.router_losses),
        learning_rate=log.learning_rate,
        train_nats_per_token=_mean(log.train_losses),
        train_nats_per_token_by_step=log.train_losses,
        router_nats_per_token=_mean(log.router_losses),
        balance_loss=_mean(log.balance_losses),
        trained_tokens=log.trained_tokens,
        sent_nats_per_token=_mean(log.sent_losses),
        sent_tokens=log.sent_tokens if log.sent_losses else None,
        epsilon=log.epsilon,
        trained_parameters=client.trained_parameters([round]),
        **_shares(client, shares_LE, client.adopted_share),
    )


def evaluated(
    client: Client,
    split: Split,
    round: int,
    result: Measurement,
    model: Literal["base", "personal"],
    part: str | None = None,
) -> Evaluation:
    """Return the "evaluation" line of metrics.jsonl. part: what alone the model is, if one."""
    # The base alone takes no step towards any download.
    adopted = client.adopted_share if model == "personal" else None
    return Evaluation(
        round=round,
        client=client.name,
        split=split,
        model=model,
        nats_per_token=result.nats_per_token,
        perplexity=result.perplexity,
        bits_per_byte=result.bits_per_byte,
        tokens=result.tokens,
        bytes=result.bytes,
        **_shares(client, result.expert_share_LE, adopted),
        kept_part=part,
    )


def _shares(
    client: Client, shares_LE: list[list[float]] | None, adopted: float | None
) -> dict[str, Any]:
    # What others know is the last expert where it is one expert, else the generalists together.
    shared: list[float] | None = None
    if shares_LE is not None and client.shape.others != "none":
        shared = [shares_E[-1] for shares_E in shares_LE]
    elif shares_LE is not None:
        shared = [sum(shares_E[: client.shape.generalists]) for shares_E in shares_LE]
    return {
        "generalist_share_by_layer": shared,
        "expert_share_by_layer": shares_LE,
        "adopted_share": adopted,
    }


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _peak_memory(device: torch.device) -> int:
    """Return the most memory that this process has had so far, in bytes, where the base is."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_memory()
