"""A server's full step on attention LoRA: the mean's direction, as long as clients' own steps."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from comigs.app import api
from comigs.errors import Stopped, UserError
from comigs.methods.full_step import mean_with_full_attention
from comigs.methods.loading import load_method
from comigs.methods.merging import mean_of_uploads
from comigs.methods.method import RoundContext
from comigs.slots import Slot
from tests.conftest import run_config, same

SLOTS = {
    Slot(0, "q", "attention", "A"): (2, 5),
    Slot(0, "q", "attention", "B"): (5, 2),
    Slot(1, "q", "attention", "B"): (5, 2),
    Slot(0, "up", "g0", "B"): (7, 2),
}
B = [slot for slot in SLOTS if slot.role == "attention" and slot.matrix == "B"]
NAMES = ("ada", "bob", "cyd")


def uploads_of(seed, names=NAMES):
    random = torch.Generator().manual_seed(seed)
    return {
        name: {slot: torch.randn(dims, generator=random) for slot, dims in SLOTS.items()}
        for name in names
    }


def merged(uploads, memory=None):
    context = RoundContext(NAMES)
    downloads, memory = mean_with_full_attention(uploads, memory or {}, context)
    assert list(downloads) == list(NAMES)
    assert all(download is downloads["ada"] for download in downloads.values())
    return downloads["ada"], memory


def test_it_is_numpys_over_two_rounds_and_all_else_is_the_mean():
    last, memory = {slot: np.zeros(SLOTS[slot]) for slot in B}, None
    for seed in (1, 2):
        uploads = uploads_of(seed)
        plain = mean_of_uploads(uploads, {}, RoundContext(NAMES))[0]["ada"]
        download, memory = merged(uploads, memory)
        for slot in SLOTS:
            if slot not in B:
                assert download[slot].equal(plain[slot])
                continue
            steps = [u[slot].double().numpy() - last[slot] for u in uploads.values()]
            mean = np.mean(steps, axis=0)
            longer = np.mean([np.linalg.norm(s) for s in steps]) / np.linalg.norm(mean)
            assert longer > 1.1
            last[slot] = last[slot] + longer * mean
            np.testing.assert_allclose(download[slot].numpy(), last[slot], rtol=1e-5, atol=1e-6)


def test_equal_uploads_and_the_only_one_come_back_unchanged():
    _, memory = merged(uploads_of(1))
    one = uploads_of(2)["ada"]
    for names in (NAMES, ("bob",)):
        assert same(merged(dict.fromkeys(names, one), memory)[0], one)


def test_the_order_of_clients_does_not_matter_and_nobody_changes_nothing():
    uploads, (_, memory) = uploads_of(2), merged(uploads_of(1))
    backwards = dict(reversed(uploads.items()))
    for slot, tensor in merged(uploads, memory)[0].items():
        torch.testing.assert_close(tensor, merged(backwards, memory)[0][slot])
    context = RoundContext(NAMES)
    assert mean_with_full_attention({}, memory, context)[1] is memory


def test_a_run_resumes_with_it(tmp_path):
    def stopping(event):
        if event.kind == "server" and event.round == 2:
            raise KeyboardInterrupt

    config = run_config(tmp_path, rounds=3, options={"attention": "full-step"})
    whole = api.run(config, tmp_path / "whole")
    with pytest.raises(Stopped):
        api.run(config, tmp_path / "stopped", report=stopping)
    stopped = api.resume(tmp_path / "stopped")
    assert stopped.metrics() == whole.metrics()
    mean = api.run(run_config(tmp_path, rounds=3, options={"attention": "mean"}), tmp_path / "mean")
    assert mean.metrics() != whole.metrics()


@pytest.mark.parametrize(
    ("field", "tree"),
    [
        ("privacy.secure_aggregation", {"privacy": {"secure_aggregation": True}}),
        ("privacy.level", {"privacy": {"level": "client", "noise_multiplier": 1.0}}),
        ("upload.merge", {"upload": {"merge": "median"}}),
    ],
)
def test_where_the_server_may_have_a_mean_alone_it_is_refused(tmp_path, field, tree):
    with pytest.raises(UserError, match=rf"^{re.escape(field)}: given .*comigs"):
        load_method(run_config(tmp_path, options={"attention": "full-step"}, **tree))
