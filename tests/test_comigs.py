"""What is ours in comigs: the server keeps the length of steps, a client judges a download on its valid."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from comigs.client.draw import probe_windows
from comigs.methods.comigs import adopt_as_valid_asks, full_step
from comigs.methods.method import Facts
from comigs.slots import Slot
from tests.conftest import run_config, same, start_engine

A, B = Slot(0, "up", "g0", "A"), Slot(0, "up", "g0", "B")
NAMES = ("ada", "bob", "cyd", "dan")
FACTS = Facts(NAMES)


def tensors(seed):
    random = torch.Generator().manual_seed(seed)
    return {A: torch.randn(3, 40, generator=random), B: torch.randn(50, 3, generator=random)}


def flat(given):
    return np.concatenate([given[slot].double().numpy().ravel() for slot in (A, B)])


def two_rounds(uploads):
    """The download of a second round with these uploads, and the first download, from which they started."""
    first, memory = full_step(dict.fromkeys(NAMES, tensors(0)), {}, FACTS)
    second, _ = full_step(uploads, memory, FACTS)
    return flat(second["ada"]), flat(first["ada"])


def test_a_step_goes_the_way_of_the_mean_as_far_as_the_clients_went_on_average():
    uploads = {name: tensors(seed) for seed, name in enumerate(NAMES, start=1)}
    second, first = two_rounds(uploads)
    updates = np.stack([flat(u) - first for u in uploads.values()])
    step, mean = second - first, updates.mean(axis=0)
    assert step @ mean / np.linalg.norm(step) / np.linalg.norm(mean) == pytest.approx(1, abs=1e-9)
    assert np.linalg.norm(step) == pytest.approx(np.linalg.norm(updates, axis=1).mean(), rel=1e-6)


def test_updates_at_right_angles_go_sqrt_n_times_the_mean():
    start = tensors(0)
    uploads = {}
    for number, name in enumerate(NAMES):
        moved = {slot: t.clone() for slot, t in start.items()}
        moved[A][0, number] += 1.0
        uploads[name] = moved
    second, first = two_rounds(uploads)
    moved = (second - first)[np.abs(second - first) > 1e-9]
    np.testing.assert_allclose(moved, np.sqrt(4) * 0.25, rtol=1e-6)


def test_updates_that_oppose_each_other_go_no_further_than_sqrt_n_times_the_mean():
    start = tensors(0)
    uploads = {
        name: {s: t + (1.0 if number % 2 else -0.99) for s, t in start.items()} for number, name in enumerate(NAMES)
    }
    second, first = two_rounds(uploads)
    np.testing.assert_allclose(second - first, np.sqrt(4) * 0.005, rtol=1e-3)


def test_where_all_agree_or_one_is_alone_the_download_is_the_upload_to_the_bit():
    for uploads in (dict.fromkeys(NAMES, tensors(5)), {"ada": tensors(5)}):
        _, memory = full_step(dict.fromkeys(NAMES, tensors(0)), {}, FACTS)
        second, _ = full_step(uploads, memory, FACTS)
        assert same(dict(second["bob"]), tensors(5))


def test_clients_that_did_not_move_leave_the_download_where_it_was():
    first, memory = full_step(dict.fromkeys(NAMES, tensors(0)), {}, FACTS)
    second, _ = full_step(first, memory, FACTS)
    assert same(dict(second["ada"]), dict(first["ada"]))


@pytest.mark.parametrize(("best", "expected"), [(0.3, 0.3), (0.0, 0.0), (1.0, 1.0), (-2.0, 0.0), (7.0, 1.0)])
def test_a_client_goes_to_the_lowest_point_of_its_valid_between_its_own_and_the_download(best, expected):
    own, download = {A: torch.zeros(2, 2)}, {A: torch.ones(2, 2)}
    adopted = adopt_as_valid_asks(own, download, lambda t: 3.0 + 0.7 * (float(t[A].mean()) - best) ** 2)
    torch.testing.assert_close(adopted[A], torch.full((2, 2), expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("slope", "expected"), [(1.0, 0.0), (-1.0, 1.0)])
def test_without_a_lowest_point_inside_it_takes_the_better_end(slope, expected):
    own, download = {A: torch.zeros(2, 2)}, {A: torch.ones(2, 2)}
    adopted = adopt_as_valid_asks(own, download, lambda t: 3.0 + slope * float(t[A].mean()))
    assert bool((adopted[A] == expected).all())


def test_a_client_never_adopts_what_is_worse_on_the_windows_it_looks_at(tmp_path):
    """With a real model and real text: of noise, a client takes nothing that makes it worse."""
    client = start_engine(run_config(tmp_path, options={"probe_windows": 8})).clients["ada"]
    client.train(1, lambda level, nats: None)
    own = client.send(1)
    client.receive(
        {slot: torch.randn(t.shape, generator=torch.Generator().manual_seed(0)) for slot, t in own.items()}, 2
    )
    windows = probe_windows(client.config, "ada", client.data, 2, 8)
    assert client._nats(client.trainee.tensors, windows) <= client._nats({**client.trainee.tensors, **own}, windows)
    kept = client.send(1)
    client.receive(kept, 2)
    assert same(kept, client.send(1))


def test_the_windows_are_of_valid_and_differ_between_rounds_but_not_between_models(tmp_path):
    client = start_engine(run_config(tmp_path)).clients["ada"]
    seen = []
    client._nats = lambda tensors, windows: seen.append(b"".join(i.tobytes() for i, _ in windows)) or 1.0
    upload = client.send(1)
    client.receive(upload, 2)
    client.receive(upload, 3)
    assert seen[0] == seen[1] == seen[2] != seen[3] == seen[5]
    valid = client.data.valid[0].tokens
    windows = {bytes(valid[i : i + 12].astype("int64")) for i in range(len(valid) - 11)}
    assert all(seen[0][at : at + 96] in windows for at in range(0, len(seen[0]), 96))
