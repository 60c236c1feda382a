"""All clients in this process, one after the other, on one base: for research, tests and the demo."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comigs.bases.load import Base
from comigs.client.client import Client
from comigs.client.evaluate import Evaluation
from comigs.client.steps import Group, RoundLog
from comigs.config import Config, Split
from comigs.data.prepare import ClientData
from comigs.engines.rounds import Reply, Report, Task
from comigs.experts.attach import Attachment
from comigs.methods.method import Download, Method, Upload


class InProcess:
    """An engine whose messages are function calls. Holds the base once, and each client's small tensors."""

    def __init__(
        self, config: Config, method: Method, base: Base, data: Mapping[str, ClientData], report: Report
    ) -> None:
        self.report = report
        self.attachment = Attachment(base.model, base.architecture, config.experts, summed=method.mixing == "sum")
        self.clients = {
            c.name: Client(c.name, config, method, base, self.attachment, data[c.name]) for c in config.clients
        }
        self.trainers = set(self.clients)
        if method.pooled:  # the first client stands for the one place that has everybody's text
            first = next(iter(self.clients.values()))
            self.trainers = {first.name}
            first.pool(list(data.values()))
        self._base_evaluations: dict[tuple[Path, ...], Evaluation] = {}

    def exchange(self, task: Task, downloads: Mapping[str, Download]) -> dict[str, Reply]:
        """One client after the other."""
        return {name: self._answer(client, task, downloads.get(name, {})) for name, client in self.clients.items()}

    def probe(self, uploads: Mapping[str, Upload], round: int) -> dict[str, dict[str, float]]:
        """reader -> author -> nats per token of the author's upload on a sample of the reader's valid."""
        return {name: client.probe(uploads, round) for name, client in self.clients.items()}

    def _answer(self, client: Client, task: Task, download: Download) -> Reply:
        start = time.perf_counter()
        metrics = []
        for split in task.evaluate_base:
            metrics.append(_evaluated(client, split, 0, self._base_evaluation(client, split), "base"))
        client.receive(download, task.round)
        if not task.train:
            client.finish()
        for split in task.evaluate:
            metrics.append(_evaluated(client, split, task.round - 1, client.evaluate(split), "personal"))
        timing: dict[str, Any] = {"round": task.round, "client": client.name, "tokens_per_second": None}
        upload: Upload | None = None
        if task.train and client.name in self.trainers:
            began, step = time.perf_counter(), 0

            def on_step(group: Group, nats: float) -> None:
                nonlocal step
                step += group == "experts"
                self.report({"kind": "step", "round": task.round, "client": client.name, "step": step,
                             "level": group, "nats_per_token": nats})  # fmt: skip

            log = client.train(task.round, on_step)
            upload = client.send(task.round)
            metrics.append(trained(client, task.round, log))
            timing["tokens_per_second"] = log.trained_tokens / (time.perf_counter() - began)
        timing |= {"seconds": time.perf_counter() - start, "peak_memory_bytes": peak_memory()}
        return Reply(upload, metrics, timing, sum(store.num_tokens for store in client.data.train))

    def _base_evaluation(self, client: Client, split: Split) -> Evaluation:
        """The base is the same for all: a text that several clients have is read once."""
        text = tuple(store.folder for store in getattr(client.data, split))
        if text not in self._base_evaluations:
            self._base_evaluations[text] = client.evaluate(split, untouched_base=True)
        return self._base_evaluations[text]

    def save(self) -> dict[str, Mapping[str, Tensor]]:
        """Every client's experts and optimisers."""
        return {f"clients/{n}/{part}": t for n, c in self.clients.items() for part, t in c.state().items()}

    def restore(self, load: Callable[[str], dict[str, Tensor]]) -> None:
        """The inverse of `save`."""
        for name, client in self.clients.items():
            client.load_state({part: load(f"clients/{name}/{part}") for part in ("experts", "optimizer")})

    def personal(self) -> dict[str, Mapping[str, Tensor]]:
        """Every client's own model."""
        return {f"clients/{name}/personal": client.state()["experts"] for name, client in self.clients.items()}


def trained(client: Client, round: int, log: RoundLog) -> dict[str, Any]:
    """The "train" line of metrics.jsonl."""
    shares = None if log.share_sum_LE is None else (log.share_sum_LE.double() / log.trained_tokens).tolist()
    return {
        "kind": "train",
        "round": round,
        "client": client.name,
        "local_steps": len(log.train_losses),
        "router_steps": len(log.router_losses),
        "learning_rate": log.learning_rate,
        "train_nats_per_token": _mean(log.train_losses),
        "train_nats_per_token_by_step": log.train_losses,
        "router_nats_per_token": _mean(log.router_losses),
        "balance_loss": _mean(log.balance_losses),
        "trained_tokens": log.trained_tokens,
        "trained_parameters": client.trained_parameters([round]),
        **_shares(client, shares),
    }


def _evaluated(client: Client, split: Split, round: int, result: Evaluation, model: str) -> dict[str, Any]:
    """The "evaluation" line of metrics.jsonl."""
    return {
        "kind": "evaluation",
        "round": round,
        "client": client.name,
        "split": split,
        "model": model,
        **result.figures(),
        **_shares(client, result.expert_share_LE),
    }


def _shares(client: Client, shares_LE: list[list[float]] | None) -> dict[str, Any]:
    generalists = None if shares_LE is None else [sum(e[: client.shape.generalists]) for e in shares_LE]
    return {"generalist_share_by_layer": generalists, "expert_share_by_layer": shares_LE}


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def peak_memory() -> int:
    """Largest memory so far in bytes: of the GPU where one is used, else of this process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
