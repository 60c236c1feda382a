"""The authors' whole training loop, replayed through our own steps: pins schedule, optimiser and
averaging.
"""

import json

import pytest
import torch

from comigs.client import steps
from comigs.client.state import new_train_state
from comigs.client.steps import MethodHooks, StepSettings, local_round
from comigs.config import ClientSection
from comigs.data.batches import Batch
from comigs.methods.merging import mean_of_uploads
from comigs.methods.method import RoundContext
from tests.authors_loop import leaky_gradients_for
from tests.golden import load

SETTINGS = ClientSection(steps=4, batch_size=2, router_every=3, router_steps=2, lr=2e-3)


def replay(settings):
    """(largest difference to the recorded tensors after training, and after the server's mean),
    over all rounds.
    """
    tensors, metadata = load.read("traj1_comigs1g1s")
    order = json.loads(metadata["batches"])
    attachment = load.attached(tensors, top_k=2)
    trainees = [
        new_train_state(load.slots(tensors, f"init.client{i}."), settings) for i in range(2)
    ]
    plan = StepSettings(settings, lr=2e-3, router_lr=2e-3, total_steps=12, dtype=torch.float32)
    server = load.slots(tensors, "init.server.")
    position = 0

    def draw(level, _):
        nonlocal position
        split = "train" if level == "experts" else "valid"
        assert order[position] == [
            client,
            split,
        ]  # our loop wants the batches that the authors' loop took
        position += 1
        name = f"batch{position - 1:03d}"
        return Batch(tensors[f"{name}.x"].numpy(), tensors[f"{name}.y"].numpy())

    worst = 0.0
    for round_ in range(3):
        uploads = {}
        for client, train_state in enumerate(trainees):
            shared = [
                slot for slot in train_state.tensors if slot.role in ("generalist", "attention")
            ]
            for slot in shared:
                train_state.tensors[slot].copy_(server[slot])
            attachment.bind(train_state.tensors)
            local_round(
                attachment, train_state, plan, draw, MethodHooks(), lambda group, loss: None
            )
            expected = load.slots(tensors, f"round{round_}.client{client}.trained.")
            worst = max(
                worst,
                *((train_state.tensors[s] - t).abs().max().item() for s, t in expected.items()),
            )
            uploads[str(client)] = {slot: train_state.tensors[slot] for slot in shared}
        downloads, _ = mean_of_uploads(uploads, {}, RoundContext(tuple(uploads)))
        server = downloads["0"]
        expected = load.slots(tensors, f"round{round_}.server.")
        worst = max(worst, *((t - expected[s]).abs().max().item() for s, t in server.items()))
    assert position == len(order)
    return worst


def test_three_rounds_equal_the_authors_when_gradients_leak_as_theirs(monkeypatch):
    monkeypatch.setattr(steps, "gradients_for", leaky_gradients_for)
    assert replay(SETTINGS) < 1e-5


def test_strict_separation_is_what_differs_from_the_authors():
    assert replay(SETTINGS) == pytest.approx(2e-2, rel=0.5)
