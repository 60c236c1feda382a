"""Clients without a model, for tests of the loop: each adds its own number and the round's to what
it received.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from comigs.config import parse_config
from comigs.methods.merging import mean_of_uploads
from comigs.methods.method import Method
from comigs.runs.folder import RunFolder
from comigs.server.protocol import Answers, Reply
from comigs.server.rounds import run_rounds
from comigs.slots import Slot

A, B = Slot(0, "up", "g0", "A"), Slot(0, "up", "g0", "B")
SHAPE = (2, 3)
GONE = "no answer by the deadline"


def averaging(**changes):
    """A method that shares everything it has, and averages it."""
    same = Method(
        "averaging",
        "a test's own",
        "-",
        lambda s: True,
        lambda s: True,
        mean_of_uploads,
        averages=True,
    )
    return replace(same, **changes)


def timing_of(round, client):
    return {
        "round": round,
        "client": client,
        "tokens_per_second": 1.0,
        "seconds": 1.0,
        "peak_memory_bytes": 1,
    }


def evaluation_of(round, client, split, model, nats=1.0):
    figures = {
        "nats_per_token": nats,
        "perplexity": 2.0,
        "bits_per_byte": 1.0,
        "tokens": 9,
        "bytes": 9,
    }
    line = {
        "kind": "evaluation",
        "round": round,
        "client": client,
        "split": split,
        "model": model,
        **figures,
    }
    return line | {
        "generalist_share_by_layer": None,
        "expert_share_by_layer": None,
        "adopted_share": None,
    }


def train_of(round, client, nats=1.0):
    return {
        "kind": "train",
        "round": round,
        "client": client,
        "local_steps": 1,
        "router_steps": 0,
        "learning_rate": 0.1,
        "train_nats_per_token": nats,
        "train_nats_per_token_by_step": [nats],
        "router_nats_per_token": None,
        "balance_loss": None,
        "generalist_share_by_layer": None,
        "expert_share_by_layer": None,
        "adopted_share": None,
        "trained_tokens": 9,
        "trained_parameters": 6,
    }


class Numbers:
    """An engine. trouble(name, task, reply): what the server gets instead: another reply, or a
    text: why there is none.

    late: replies that come in with the next exchange.
    """

    def __init__(
        self, names="ada bob", trouble=lambda name, task, reply: reply, slots=(A,), fail_at=None
    ):
        self.names, self.trouble, self.slots, self.fail_at = names.split(), trouble, slots, fail_at
        self.shapes = dict.fromkeys(self.names, dict.fromkeys(slots, SHAPE))
        self.tasks, self.received, self.sent, self.late, self.folder = [], [], [], {}, None

    def exchange(self, tasks, downloads):
        late, self.late = self.late, {}
        self.tasks.append(dict(tasks))
        self.received.append({name: dict(d) for name, d in downloads.items()})
        replies, absent = {}, {}
        for name, task in tasks.items():
            if (task.round, name) == self.fail_at:
                raise KeyboardInterrupt
            came = self.trouble(name, task, self.answer(name, task, downloads.get(name, {})))
            (absent if isinstance(came, str) else replies)[name] = came
        self.sent.append({name: dict(reply.upload or {}) for name, reply in replies.items()})
        return Answers(replies, absent, late)

    def probe(self, uploads, round):
        raise AssertionError("no method here reads peers")

    def answer(self, name, task, download):
        number, path = self.names.index(name), f"clients/{name}/state"
        state = torch.full(SHAPE, float(number))
        if self.folder.holds(path):
            state = self.folder.load(path)[str(A)]
        for tensor in download.values():
            state = tensor.clone()
        nats = state.mean().item()
        lines = [evaluation_of(0, name, split, "base", nats) for split in task.evaluate_base]
        lines += [
            evaluation_of(task.round - 1, name, split, "personal", nats) for split in task.evaluate
        ]
        timing = timing_of(task.round, name)
        if not task.train:
            self.folder.stage(f"clients/{name}/personal", {str(A): state}, task.round)
            return Reply(None, lines, timing, 9, task.round)
        state = state + number + task.round / 7
        self.folder.stage(path, {str(A): state}, task.round)
        upload = dict.fromkeys(self.slots, state.clone())
        return Reply(
            upload, [*lines, train_of(task.round, name, state.mean().item())], timing, 9, task.round
        )


def rounds_of(
    root, engine, method=None, name="run", report=lambda event: None, entries=None, **tree
):
    """Run (on) in a folder of that name. These clients have no best round."""
    tree = {**tree, "evaluation": {"keep": "last", **tree.get("evaluation", {})}}
    clients = [
        {"name": client, "text": client, **(entries or {}).get(client, {})}
        for client in engine.names
    ]
    config, path = parse_config({"rounds": 2, **tree, "clients": clients}), root / name
    engine.folder = RunFolder.open(path) if path.exists() else RunFolder.create(path, config, {})
    with engine.folder as folder:
        run_rounds(config, method or averaging(), engine, folder, report)
    return folder


def lines_of(folder, kind):
    """The lines of a kind, as they are in the file."""
    lines = [line.as_json() for line in folder.metrics()]
    return [line for line in lines if line["kind"] == kind]
