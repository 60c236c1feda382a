"""A client: what goes in, what may come out, and that it goes on from its saved state as if never
stopped.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from comigs.app import api
from comigs.client.client import Client
from comigs.client.steps import NonFiniteLoss
from comigs.client.workplace import Workplace
from comigs.errors import UserError
from comigs.slots import Slot
from tests.conftest import APART, WORDS, bits, copy_of, run_config, same, start_engine
from tests.test_idle_clients import exchange

QUIET = lambda level, nats: None  # noqa: E731


def client_of(root, name="ada", **tree):
    return start_engine(run_config(root, **tree)).clients[name]


def saved(client):
    """Through the bytes of safetensors files and back."""
    parts = client.state().items()
    return {
        part: safetensors.torch.load(safetensors.torch.save(copy_of(tensors)))
        for part, tensors in parts
    }


def test_receiving_writes_the_downloads_slots_and_nothing_else(tmp_path):
    client = client_of(tmp_path, options={"adopt": "all", **APART})
    client.train(1, QUIET)
    before, tensors = saved(client), dict(client.train_state.tensors)
    shared = [slot for slot in tensors if slot.role in ("generalist", "attention")]
    download = {slot: torch.full_like(tensors[slot], 0.25) for slot in shared}
    client.receive(download)
    after = saved(client)
    assert same(
        before["optimizer"], after["optimizer"]
    )  # moments stay, though they met other weights
    for slot, tensor in tensors.items():
        assert client.train_state.tensors[slot] is tensor  # the optimisers hold this very tensor
        if slot in download:
            assert bool((tensor == 0.25).all())
        else:
            assert bits(before["experts"][str(slot)]) == bits(tensor)
    download[shared[0]].fill_(7.0)
    assert bool((tensors[shared[0]] == 0.25).all())  # a copy, not the server's own tensor


def test_whoever_misses_rounds_goes_on_at_the_rate_that_everybody_has_by_then(tmp_path):
    config = run_config(tmp_path, rounds=4)
    present, absent = (start_engine(config).clients[name] for name in ("ada", "bob"))
    rates = [present.train(round, QUIET).learning_rate for round in (1, 2, 3, 4)]
    assert rates[0] > rates[1] > rates[2] > rates[3]
    assert [absent.train(round, QUIET).learning_rate for round in (2, 4)] == [rates[1], rates[3]]
    assert (
        absent.train_state.local_steps == 2 * config.client.steps
    )  # its own, by which it draws its text


@pytest.mark.parametrize("role", ["specialist", "router"])
def test_a_download_may_not_touch_what_is_private_whatever_the_method_says(tmp_path, role):
    client = client_of(tmp_path)
    client.method = replace(client.method, receives=lambda slot: True)
    slot = next(slot for slot in client.train_state.tensors if slot.role == role)
    before = saved(client)
    with pytest.raises(AssertionError, match="may not touch"):
        client.receive({slot: torch.ones_like(client.train_state.tensors[slot])})
    assert same(before["experts"], saved(client)["experts"])


def test_a_download_may_not_touch_what_the_method_does_not_receive(tmp_path):
    client = client_of(tmp_path, experts={"rank": 2, "share_attention": False})
    slot = next(slot for slot in client.train_state.tensors if slot.role == "attention")
    with pytest.raises(AssertionError, match="may not touch"):
        client.receive({slot: torch.ones_like(client.train_state.tensors[slot])})


@pytest.mark.parametrize("role", ["specialist", "router"])
def test_private_slots_are_never_sent_whatever_the_method_says(tmp_path, role):
    client = client_of(tmp_path)
    client.method = replace(client.method, shares=lambda slot: slot.role == role)
    with pytest.raises(AssertionError, match="never leaves a client"):
        client.send(1)


def test_what_is_sent_is_a_copy_without_gradient(tmp_path):
    client = client_of(tmp_path)
    upload = client.send(1)
    before = copy_of(upload)
    client.train(1, QUIET)
    assert same(before, upload)
    assert not any(t.requires_grad for t in upload.values())
    assert not same(upload, client.send(1))


@pytest.mark.parametrize(
    "shape", [{}, {"specialists": 2, "specialist_rank": 3, "top_k": 1}, {"specialists": 0}]
)
def test_a_client_goes_on_from_its_saved_state_to_the_bit(tmp_path, shape):
    tree = {"experts": {"rank": 2, **shape}}
    client, resumed = client_of(tmp_path, **tree), client_of(tmp_path, **tree)
    client.train(1, QUIET)
    resumed.load_state(saved(client))
    for round in (2, 3):
        logs = [c.train(round, QUIET) for c in (client, resumed)]
        assert (
            logs[0].train_losses == logs[1].train_losses
            and logs[0].router_losses == logs[1].router_losses
        )
        for part in ("experts", "optimizer"):
            assert same(client.state()[part], resumed.state()[part])
    assert client.train_state.local_steps == resumed.train_state.local_steps == 6


@pytest.mark.parametrize("built", ["at its start", "trained before", "with the state"])
def test_a_client_is_exactly_what_was_saved_whatever_it_was_before(tmp_path, built):
    """Moments of tensors that the saved state never stepped are gone too."""
    config = run_config(
        tmp_path, client={"steps": 1, "batch_size": 4, "router_every": 2, "router_steps": 1}
    )
    engine = start_engine(config).engine
    client = engine.host.client("ada")
    client.train(1, QUIET)  # no router step yet
    state = saved(client)
    assert not any("router" in name for name in state["optimizer"] if name != "router_steps")
    if built == "with the state":
        place = Workplace(config, client.method, client.base, client.attachment)
        other = Client("ada", place, client.data, state)
    else:
        other = engine.host.client("ada")
        for round in (1, 2, 3) if built == "trained before" else ():
            other.train(round, QUIET)
        other.load_state(state)
    for part in ("experts", "optimizer"):
        assert same(state[part], other.state()[part])
    for tensors in state.values():
        for tensor in tensors.values():
            tensor.zero_()  # it has its own
    assert same(saved(client)["experts"], other.state()["experts"])
    logs = [c.train(2, QUIET) for c in (client, other)]
    assert logs[0] == replace(logs[1], share_sum_LE=logs[0].share_sum_LE)
    assert all(same(client.state()[part], other.state()[part]) for part in ("experts", "optimizer"))


def test_a_saved_state_holds_every_tensor_and_every_moment(tmp_path):
    client = client_of(tmp_path)
    assert set(client.state()["optimizer"]) == {
        "local_steps",
        "router_steps",
    }  # nothing stepped yet
    client.train(1, QUIET)
    slots = client.train_state.tensors
    names = {str(slot) for slot in slots if not slot.is_frozen}
    state = client.state()
    assert set(state["experts"]) == {str(slot) for slot in slots}
    moments = {f"{name}/{key}" for name in names for key in ("exp_avg", "exp_avg_sq", "step")}
    assert set(state["optimizer"]) == moments | {"local_steps", "router_steps"}
    assert (
        int(state["optimizer"]["local_steps"]) == 2 and int(state["optimizer"]["router_steps"]) == 2
    )


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_another_configs_state_is_refused_and_changes_nothing(tmp_path, change):
    client = client_of(tmp_path)
    state, before = saved(client), saved(client)
    name = "1.up.s0.A"
    if change == "missing":
        del state["experts"][name]
    elif change == "extra":
        state["experts"]["9.up.s0.A"] = torch.zeros(2, 2)
    else:
        state["experts"][name] = torch.zeros(1, 16)  # would broadcast
    with pytest.raises(UserError, match="another config or base"):
        client.load_state(state)
    assert same(before["experts"], saved(client)["experts"])


def test_a_clients_batches_do_not_depend_on_who_else_takes_part(tmp_path):
    few, many = run_config(tmp_path, "bob"), run_config(tmp_path, "ada bob cyd")
    alone, in_company = start_engine(few).clients["bob"], start_engine(many).clients["bob"]
    in_company.evaluate("test")
    for level, number in (("experts", 0), ("experts", 5), ("router", 0)):
        for a, b in zip(
            alone._next_batch(level, number)[:2],
            in_company._next_batch(level, number)[:2],
            strict=True,
        ):
            assert (a == b).all()
    assert same(
        alone.train_state.tensors, in_company.train_state.tensors
    )  # and neither does where it starts


def test_batches_differ_by_seed_split_and_number(tmp_path):
    client, other_seed = client_of(tmp_path), client_of(tmp_path, seed=43)
    draws = [
        client._next_batch("experts", 0),
        client._next_batch("experts", 1),
        client._next_batch("router", 0),
    ]
    draws.append(other_seed._next_batch("experts", 0))
    assert len({inputs.tobytes() for inputs, _, _ in draws}) == len(draws)


def test_two_clients_with_the_same_text_draw_different_batches(tmp_path):
    ada, bob = (client_of(tmp_path, name) for name in ("ada", "bob"))
    bob.data = ada.data
    assert (ada._next_batch("experts", 0)[0] != bob._next_batch("experts", 0)[0]).any()


def test_a_loss_that_is_not_finite_is_told_as_one_line_with_client_round_and_batch(tmp_path):
    client = client_of(tmp_path)
    client.train(1, QUIET)
    client.train_state.tensors[Slot(0, "up", "s0", "B")].fill_(math.inf)
    with pytest.raises(
        UserError, match=r"client ada: the loss is nan in round 2, train batch 2"
    ) as raised:
        client.train(2, QUIET)
    assert "\n" not in str(raised.value) and not isinstance(raised.value, NonFiniteLoss)
    with pytest.raises(UserError, match="Start a new run and lower"):
        client.evaluate("test")


def windows_of(raw, size):
    return {raw[i : i + size] for i in range(len(raw) - size + 1)}


def bytes_of(tensors):
    """Everything a file of these tensors would hold: values, names and shapes."""
    return safetensors.torch.save({str(slot): t.contiguous() for slot, t in tensors.items()})


def private_windows(tensors):
    """Every 16 bytes in a row of a client's specialists and router, by slot name.

    A router's gate is one number, of four bytes, which any number may have.
    """
    found = {}
    for name, tensor in tensors.items():
        slot = Slot.parse(str(name))
        if slot.role in ("specialist", "router") and not slot.is_gate:
            found[str(name)] = windows_of(tensor.detach().contiguous().numpy().tobytes(), 16)
    assert found
    return found


def leaks(raw, private):
    return sorted(name for name, windows in private.items() if windows & windows_of(raw, 16))


def texts_of(root, name):
    """Every 24 bytes in a row of a client's text."""
    pieces = set()
    for path in (root / name).glob("*.txt"):
        assert WORDS[name].split()[0] in path.read_text(encoding="utf-8")
        pieces |= windows_of(path.read_bytes(), 24)
    return pieces


MANY_STEPS = {"steps": 4, "batch_size": 4, "router_every": 2, "router_steps": 2, "lr": 5e-3}


def test_no_upload_has_a_byte_of_specialists_routers_or_text(tmp_path):
    config = run_config(
        tmp_path, "ada bob", client=MANY_STEPS, experts={"rank": 2, "specialists": 2}
    )
    engine = start_engine(config).engine
    for round in (1, 2):
        replies = exchange(engine, round)
        clients = {name: engine.host.client(name, staged=True) for name in replies}
        for name, client in clients.items():
            raw, private = (
                bytes_of(replies[name].upload),
                private_windows(client.train_state.tensors),
            )
            assert leaks(raw, private) == []
            assert not any(
                name in raw for name in (b".s0.", b".s1.", b".router.")
            )  # two letters alone may be a number
            for other, owner in clients.items():
                assert not texts_of(tmp_path, other) & windows_of(raw, 24)
                for store in (
                    *owner.data.train,
                    *owner.data.valid,
                    *owner.data.test,
                ):  # nor of the text as tokens
                    assert not windows_of(store.tokens.tobytes(), 24) & windows_of(raw, 24)
            # the same look does find them where they are
            assert leaks(bytes_of(client.train_state.tensors), private) == sorted(private)
            assert leaks(raw, {"shared": windows_of(raw[-64:], 16)}) == ["shared"]
        engine.host.folder.commit(round, [], [])


def test_the_servers_folder_has_no_byte_of_specialists_routers_or_text(tmp_path):
    config, looked_at = run_config(tmp_path, "ada bob", client=MANY_STEPS, rounds=3), []
    out = tmp_path / "run"

    def look(event):
        """Called after each commit; the folders of the rounds before are deleted by then."""
        if event.kind != "server":
            return
        for path in (out / "server").glob("*.safetensors"):
            raw = path.read_bytes()
            looked_at.append(path.name)
            for name in ("ada", "bob"):
                (experts,) = (out / "clients" / name).glob("*.experts.safetensors")
                private = private_windows(safetensors.torch.load_file(experts))
                assert leaks(raw, private) == [] and leaks(experts.read_bytes(), private) == sorted(
                    private
                )
                assert not texts_of(tmp_path, name) & windows_of(raw, 24)
                assert not any(part in raw for part in (b".s0.", b".router."))

    api.run(config, out, report=look)
    assert looked_at == [f"round-000{number}.state.safetensors" for number in (1, 2, 3)]
    for path in out.rglob("*.json*"):  # and no text in what is measured
        assert not (texts_of(tmp_path, "ada") | texts_of(tmp_path, "bob")) & windows_of(
            path.read_bytes(), 24
        )
