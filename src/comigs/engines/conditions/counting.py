"""This engine's clients train nothing: they say how much work what they are asked would be.

Behind simulated devices (engine.py) that is enough to know when each answer is in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from comigs.client.shared_part import learns_at_home
from comigs.config import Config, Split
from comigs.experts.init import starting_tensors
from comigs.methods.method import Download, Method, Upload
from comigs.privacy.budget import batch_of
from comigs.runs.folder import RunFolder
from comigs.runs.metrics import ClientReport, Evaluation, Kept, Timing, TrainReport
from comigs.server.protocol import Answers, Reply, Task
from comigs.server.validation import expected_upload
from comigs.slots import Shapes

# What nobody measures here, but a client's lines must have.
UNKNOWN: dict[str, Any] = {
    **{"nats_per_token": 0.0, "perplexity": 1.0, "bits_per_byte": 0.0, "bytes": 0},
    **{"generalist_share_by_layer": None, "expert_share_by_layer": None, "adopted_share": None},
}
UNTRAINED: dict[str, Any] = {
    **{"train_nats_per_token": 0.0, "router_nats_per_token": 0.0, "balance_loss": 0.0},
    **{"generalist_share_by_layer": None, "expert_share_by_layer": None, "adopted_share": None},
    **{"learning_rate": 0.0, "trained_parameters": 0},
}


class Counting:
    """These clients send their starting tensors, and count the steps that they would have done.

    shapes: of every tensor that a client has, by client. tokens: of each client's splits. Windows
    count as full.
    """

    def __init__(
        self,
        config: Config,
        method: Method,
        shapes: Mapping[str, Shapes],
        tokens: Mapping[str, Mapping[Split, int]],
        folder: RunFolder,
    ) -> None:
        self.shapes = shapes
        self._config, self._method, self._tokens, self._folder = config, method, tokens, folder
        self._trainers = config.names[: 1 if method.centralized else None]

    def close(self) -> None:
        """Give nothing back: nothing is held."""

    def exchange(self, tasks: Mapping[str, Task], downloads: Mapping[str, Download]) -> Answers:
        """Return everybody's reply."""
        return Answers({name: self._reply(name, task) for name, task in tasks.items()})

    def probe(self, uploads: Mapping[str, Upload], round: int) -> dict[str, dict[str, float]]:
        """Return the same of every upload, for every reader."""
        return {reader: dict.fromkeys(uploads, 1.0) for reader in uploads}

    def _reply(self, name: str, task: Task) -> Reply:
        # what run_task measures, in that order
        metrics: list[ClientReport] = []
        for split in task.evaluate_base:
            metrics.append(Evaluation(**self._measured(name, split, 0, "base")))
        for split in task.evaluate:
            metrics.append(Evaluation(**self._measured(name, split, task.round - 1, "personal")))
        if self._config.evaluation.keep == "best" and not task.train:
            metrics.append(Kept(**self._measured(name, "test", task.round - 1, "personal")))

        # where text is centralized, one client trains for all
        upload: Upload | None = None
        if task.train and name in self._trainers:
            slots = expected_upload(self._method, self.shapes[name], task.round)
            upload = starting_tensors(slots, self._config.seed, name)
            metrics.append(self._trained(name, task.round))
        timing = Timing(
            round=task.round, client=name, tokens_per_second=None, seconds=0.0, peak_memory_bytes=0
        )
        return Reply(upload, metrics, timing, self._tokens[name]["train"], task.round)

    def _measured(self, name: str, split: Split, round: int, model: str) -> dict[str, Any]:
        tokens = self._tokens[name][split]
        where = {"round": round, "client": name, "split": split, "model": model}
        return {**where, **UNKNOWN, "tokens": tokens}

    def _trained(self, name: str, round: int) -> TrainReport:
        """Return what a round of training would report, and keep how many steps were done."""
        # What is undone on the way takes its steps with it: they are part of the run folder.
        settings, path, before = self._config.client, f"clients/{name}/steps", 0
        if self._folder.holds(path):
            before = int(self._folder.load(path)["local"])
        after = before + settings.steps
        self._folder.stage(path, {"local": torch.tensor(after)}, round)

        # as client/steps.py counts phases, and a pool of text has a batch of every client's
        phases, windows = 0, settings.batch_size
        if self._method.centralized:
            windows *= len(self._config.clients)
        if self._method.schedule != "joint" and self._has_router(name):
            phases = after // settings.router_every - before // settings.router_every
        length, noised = self._config.data.sequence_length, None
        trained = settings.steps * windows * length
        if self._config.privacy.by_document:
            noised = int(settings.steps * batch_of(self._config) * length)
            if not any(learns_at_home(self._method, slot, round) for slot in self.shapes[name]):
                trained, noised, phases = noised, None, 0
        return TrainReport(
            round=round,
            client=name,
            local_steps=settings.steps,
            router_steps=phases * settings.router_steps,
            train_nats_per_token_by_step=[0.0] * settings.steps,
            trained_tokens=trained,
            sent_tokens=noised,
            **UNTRAINED,
        )

    def _has_router(self, name: str) -> bool:
        return any(slot.role == "router" for slot in self.shapes[name])
