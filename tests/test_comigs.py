"""What is ours in comigs: a client judges a download on its valid, and in comigs-others keeps the
rest of the world beside its own.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from comigs.data.sampling import probe_windows
from comigs.errors import UserError
from comigs.methods.comigs import mix_as_valid_asks, share_that_valid_asks
from comigs.server.protocol import Task
from comigs.slots import Slot
from tests.conftest import run_config, same, start_engine

A = Slot(0, "up", "g0", "A")


@pytest.mark.parametrize(
    ("best", "expected"), [(0.3, 0.3), (0.0, 0.0), (1.0, 1.0), (-2.0, 0.0), (7.0, 1.0)]
)
def test_a_client_goes_to_the_lowest_point_of_its_valid_between_its_own_and_the_download(
    best, expected
):
    own, download = {A: torch.zeros(2, 2)}, {A: torch.ones(2, 2)}
    adopted, share = mix_as_valid_asks(
        own, download, lambda t: 3.0 + 0.7 * (float(t[A].mean()) - best) ** 2
    )
    assert share == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(adopted[A], torch.full((2, 2), expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("slope", "expected"), [(1.0, 0.0), (-1.0, 1.0)])
def test_without_a_lowest_point_inside_it_takes_the_better_end(slope, expected):
    own, download = {A: torch.zeros(2, 2)}, {A: torch.ones(2, 2)}
    adopted, share = mix_as_valid_asks(own, download, lambda t: 3.0 + slope * float(t[A].mean()))
    assert share == expected
    assert bool((adopted[A] == expected).all())


def test_a_client_never_adopts_what_is_worse_on_the_windows_it_looks_at(tmp_path):
    """With a real model and real text: of noise, its generalists take nothing that makes them
    worse.
    """
    client = start_engine(run_config(tmp_path, options={"probe_windows": 8})).clients["ada"]
    client.train(1, lambda level, nats: None)
    own = client.send(1)
    client.receive(
        {
            slot: torch.randn(t.shape, generator=torch.Generator().manual_seed(0))
            for slot, t in own.items()
        },
        2,
    )
    windows = probe_windows(client.config, "ada", client.data, 2, 8)
    now, before = (
        client.train_state.tensors,
        {slot: t for slot, t in own.items() if slot.role == "generalist"},
    )
    assert client._nats(now, windows) <= client._nats({**now, **before}, windows)
    kept = client.send(1)
    client.receive(kept, 2)
    assert same(kept, client.send(1))


def test_the_windows_are_of_valid_and_differ_between_rounds_but_not_between_models(tmp_path):
    client = start_engine(run_config(tmp_path)).clients["ada"]
    seen = []
    client._nats = lambda tensors, windows: (
        seen.append(b"".join(i.tobytes() for i, _, _ in windows)) or 1.0
    )
    download = {slot: tensor + 0.01 for slot, tensor in client.send(1).items()}
    client.receive(download, 2)
    client.receive({slot: tensor + 0.01 for slot, tensor in download.items()}, 3)
    assert seen[0] == seen[1] == seen[2] != seen[3] == seen[5]
    valid = client.data.valid[0].tokens
    windows = {bytes(valid[i : i + 12].astype("int64")) for i in range(len(valid) - 11)}
    assert all(seen[0][at : at + 96] in windows for at in range(0, len(seen[0]), 96))


def test_where_it_makes_no_difference_all_of_a_download_is_adopted():
    assert (
        share_that_valid_asks({A: torch.zeros(2, 2)}, {A: torch.ones(2, 2)}, lambda t: 3.0) == 1.0
    )


def test_the_rest_of_the_world_is_the_last_download_and_nothing_else_changes_it(tmp_path):
    engine = start_engine(run_config(tmp_path, method="comigs-others")).engine
    download = {}
    for round in (1, 2, 3):
        tasks = {
            name: Task(round=round, train=True, evaluate=(), evaluate_base=())
            for name in ("ada", "bob")
        }
        replies = engine.exchange(tasks, dict.fromkeys(tasks, download)).replies
        uploads = {name: dict(reply.upload) for name, reply in replies.items()}
        own = engine.host.client("ada", staged=True).train_state.tensors
        rest = {slot: t for slot, t in own.items() if slot.role == "rest"}
        assert len(rest) == sum(s.part == "g0" for s in own)
        for slot, tensor in rest.items():
            if download:
                torch.testing.assert_close(
                    tensor, download[replace(slot, part="g0")], rtol=0, atol=0
                )
            else:
                assert slot.matrix == "A" or not tensor.any()  # as the base
        gates = {float(t) for s, t in own.items() if s.is_gate}
        assert len(gates) == 1 and 0 <= min(gates) <= 1 and (download or gates == {0.0})
        shares = {line.adopted_share for line in replies["ada"].metrics}
        assert shares == ({1 - min(gates)} if download else {None})
        assert {s.role for s in uploads["ada"]} == {"generalist", "attention"}
        download = {
            slot: (uploads["ada"][slot] + uploads["bob"][slot]) / 2 for slot in uploads["ada"]
        }
        engine.host.folder.commit(round, [], [])


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_router_is_as_far_open_to_the_rest_as_the_download_was_not_adopted(tmp_path, share):
    """Where all of it was, the rest has no say: the model is the one without it."""
    config = run_config(tmp_path, method="comigs-others")
    client = start_engine(config).clients["ada"]
    client.train(1, lambda level, nats: None)
    own = client.send(1)
    download = {slot: t + 0.1 * torch.randn(t.shape) for slot, t in own.items()}
    first = next(slot for slot in own if slot.part == "g0")
    far = float((download[first] - own[first])[0, 0])
    client._nats = lambda tensors, windows: (
        (float((tensors[first] - own[first])[0, 0]) / far - share) ** 2
    )
    client.receive(download, 2)
    del client._nats
    tensors = client.train_state.tensors
    torch.testing.assert_close(tensors[first], torch.lerp(own[first], download[first], share))
    assert {float(t) for s, t in tensors.items() if s.is_gate} == {1 - share}
    assert client.adopted_share == share
    client.receive({}, 3)
    assert client.adopted_share is None
    alone = {s: t for s, t in tensors.items() if s.role not in ("router", "rest")}
    windows = probe_windows(client.config, "ada", client.data, 2, 8)
    differs = abs(client._nats(tensors, windows) - client._nats(alone, windows))
    assert (differs < 1e-7) == (share == 1)


def test_a_download_that_is_the_clients_own_is_not_adopted_and_the_router_stays_closed(tmp_path):
    client = start_engine(run_config(tmp_path)).clients["ada"]
    client.train(1, lambda level, nats: None)
    before = {slot: tensor.clone() for slot, tensor in client.train_state.tensors.items()}
    client.receive(client.send(1), 2)
    after = client.train_state.tensors
    assert client.adopted_share == 0
    assert {float(tensor) for slot, tensor in after.items() if slot.is_gate} == {0.0}
    assert all(after[s].equal(before[s]) for s in after if s.role in ("generalist", "specialist"))


def test_whoever_takes_every_download_whole_has_no_others(tmp_path):
    with pytest.raises(UserError, match=r'options\.adopt: "comigs-others" has no such option'):
        start_engine(run_config(tmp_path, method="comigs-others", options={"adopt": "all"}))


@pytest.mark.parametrize(("numbers", "rank"), [((1, 1), 6), ((2, 1), 9), ((0, 1), 3)])
def test_the_own_expert_has_the_ranks_of_all_that_are_configured(tmp_path, numbers, rank):
    experts = {
        "generalists": numbers[0],
        "specialists": numbers[1],
        "rank": 3,
        "specialist_rank": 3,
    }
    client = start_engine(run_config(tmp_path, method="comigs-others", experts=experts))
    shape = client.clients["ada"].shape
    assert (shape.parts, shape.rank) == (["g0", "rest"], rank)


def test_ranks_that_differ_are_refused_with_what_helps(tmp_path):
    with pytest.raises(
        UserError, match=r"clients\.bob: rank 5, but ada has 4; .* method comigs takes specialists"
    ):
        start_engine(run_config(tmp_path, entries={"bob": {"rank": 3}}, method="comigs-others"))


def test_the_routers_phases_come_on_top_of_its_local_steps(tmp_path):
    started = start_engine(run_config(tmp_path, method="comigs-others"))
    client = started.clients["ada"]
    routers = {
        slot: t.clone() for slot, t in client.train_state.tensors.items() if slot.matrix == "W"
    }
    log = client.train(1, lambda level, nats: None)
    assert log.router_losses and client.step_settings.schedule == "both"
    assert all(
        (client.train_state.tensors[slot] != before).any() for slot, before in routers.items()
    )
    state = client.train_state.optimizers["router"].state[
        client.train_state.tensors[next(iter(routers))]
    ]
    assert (
        int(state["step"]) == len(log.router_losses) + len(log.train_losses) - 1
    )  # in the first, experts are alike
