"""What is ours in comigs: the server keeps the length of steps, a client judges a download on its valid."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from comigs.client.draw import probe_windows
from comigs.engines.exchange import Task
from comigs.errors import UserError
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


@pytest.mark.parametrize(("own", "generalists"), [("configured", 1), ("configured", 2), ("one", 1)])
def test_the_rest_of_the_world_is_the_last_download_and_nothing_else_changes_it(tmp_path, own, generalists):
    options = {"rest": "frozen", "own": own}
    config = run_config(tmp_path, options=options, experts={"rank": 2, "generalists": generalists, "top_k": 2})
    engine = start_engine(config).engine
    download = {}
    for round in (1, 2, 3):
        tasks = {name: Task(round=round, train=True, evaluate=(), evaluate_base=()) for name in ("ada", "bob")}
        uploads = {n: dict(r.upload) for n, r in engine.exchange(tasks, dict.fromkeys(tasks, download)).replies.items()}
        own = engine.bench.client("ada", staged=True).trainee.tensors
        rest = {slot: t for slot, t in own.items() if slot.role == "generalist" and int(slot.part[1:]) >= generalists}
        assert len(rest) == generalists * sum(s.part == "g0" for s in own)
        for slot, tensor in rest.items():
            source = replace(slot, part=f"g{int(slot.part[1:]) - generalists}")
            if download:
                torch.testing.assert_close(tensor, download[source], rtol=0, atol=0)
            else:
                assert slot.matrix == "A" or not tensor.any()  # as the base
        gates = {float(t) for s, t in own.items() if s.role == "router" and s.matrix == "B" for t in t}
        assert len(gates) == 1 and 0 <= min(gates) <= 1 and (download or gates == {0.0})
        assert not uploads["ada"].keys() & rest.keys() and any(s.role == "generalist" for s in uploads["ada"])
        download = {slot: (uploads["ada"][slot] + uploads["bob"][slot]) / 2 for slot in uploads["ada"]}
        engine.bench.folder.commit(round, [], [])


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_router_is_as_far_open_to_the_rest_as_the_download_was_not_adopted(tmp_path, share):
    """Where all of it was, the rest has no say: the model is the one without it."""
    config = run_config(tmp_path, options={"rest": "frozen", "own": "one"}, experts={"strength": "each"})
    client = start_engine(config).clients["ada"]
    client.train(1, lambda level, nats: None)
    own = client.send(1)
    download = {slot: t + 0.1 * torch.randn(t.shape) for slot, t in own.items()}
    first = next(slot for slot in own if slot.part == "g0")
    far = float((download[first] - own[first])[0, 0])
    client._nats = lambda tensors, windows: (float((tensors[first] - own[first])[0, 0]) / far - share) ** 2
    client.receive(download, 2)
    del client._nats
    tensors = client.trainee.tensors
    torch.testing.assert_close(tensors[first], torch.lerp(own[first], download[first], share))
    assert {float(t) for s, t in tensors.items() if s.role == "router" and s.matrix == "B"} == {1 - share}
    alone = {s: t for s, t in tensors.items() if s.role != "router" and s.part != "g1"}
    windows = probe_windows(client.config, "ada", client.data, 2, 8)
    differs = abs(client._nats(tensors, windows) - client._nats(alone, windows))
    assert (differs < 1e-7) == (share == 1)


def test_nothing_is_beside_a_client_that_takes_every_download_whole(tmp_path):
    with pytest.raises(UserError, match=r'options\.rest: "frozen" needs options\.adopt "valid", given "all"'):
        start_engine(run_config(tmp_path, options={"rest": "frozen", "adopt": "all"}))


def test_own_experts_that_are_one_have_the_rank_of_all_together(tmp_path):
    config = run_config(tmp_path, options={"own": "one"}, experts={"rank": 2, "specialists": 2, "specialist_rank": 3})
    sent = start_engine(config).clients["ada"].send(1)
    assert {t.shape[0] for s, t in sent.items() if s.part == "g0" and s.matrix == "A"} == {8}


def test_the_routers_phases_come_on_top_of_its_local_steps(tmp_path):
    started = start_engine(run_config(tmp_path, options={"router": "both"}))
    client = started.clients["ada"]
    routers = {slot: t.clone() for slot, t in client.trainee.tensors.items() if slot.role == "router"}
    log = client.train(1, lambda level, nats: None)
    assert log.router_losses and client.plan.schedule == "both"
    assert all((client.trainee.tensors[slot] != before).any() for slot, before in routers.items())
    state = client.trainee.optimizers["router"].state[client.trainee.tensors[next(iter(routers))]]
    assert int(state["step"]) == len(log.router_losses) + len(log.train_losses) - 1  # in the first, experts are alike
