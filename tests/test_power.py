"""A client that gains or loses a specialist: its function, its optimiser, and runs over both
engines.
"""

from __future__ import annotations

import pytest
import torch

from comigs.app import api
from comigs.app.routes import routes
from comigs.bases.load import load_base
from comigs.client.client import Client
from comigs.client.power import lost, with_specialists
from comigs.client.state import new_train_state
from comigs.client.workplace import Workplace, workplace
from comigs.config import parse_config
from comigs.data.prepare import prepare
from comigs.engines.client_task import run_task
from comigs.errors import UserError
from comigs.methods.loading import load_method
from comigs.personal.routes.weights import shared_experts
from comigs.server.protocol import Task
from comigs.slots import Slot
from tests.conftest import APART, run_config
from tests.local_grid import Federation

ROUTER = Slot(1, "mlp", "router", "W")


def client_of(root, specialists=1, trained=True, **tree):
    """A client that has trained for a round, so that nothing of it is as it started."""
    experts = {"specialists": specialists, **tree.pop("experts", {})}
    tree = {"options": APART, **tree}
    config = run_config(root, "ada", method="comigs", experts=experts, **tree)
    base = load_base(config.base)
    data = prepare(config, base.encoder).load("ada")
    client = Client("ada", workplace(config, load_method(config), base), data)
    if trained:
        client.train(1, lambda level, nats: None)
    return client


def logits_of(client, dtype=torch.float64):
    """What the client's model says, in that precision."""
    model = client.base.model.to(dtype)
    tensors = {slot: tensor.to(dtype) for slot, tensor in client.train_state.tensors.items()}
    client.attachment.bind(tensors, client.opening)
    with torch.no_grad():
        ids = torch.arange(60).reshape(3, 20) * 7 % 250
        logits = model(input_ids=ids).logits
    model.to(torch.float32)
    return logits


@pytest.mark.parametrize(
    "settings, before, after",
    [
        ({}, 1, 2),  # as many experts as a token uses, and one more
        ({}, 2, 4),
        ({}, 0, 1),  # no router before, and another scale after
        ({}, 0, 2),
        ({"top_k": 1}, 1, 2),
        ({"top_k": 1, "strength": "each"}, 0, 1),
        ({"top_k": 3, "rank": 3, "specialist_rank": 1}, 0, 2),
        ({"routing": "sequence"}, 1, 2),
        ({"routing": "client"}, 1, 2),
    ],
)
def test_gaining_changes_no_logit(tmp_path, settings, before, after):
    client = client_of(tmp_path, before, experts=settings)
    exact, usual = logits_of(client), logits_of(client, torch.float32)
    richer = with_specialists(client, after)
    assert richer.shape.specialists == after
    # float32 is the routing's own softmax and the type of a changed scale's B
    torch.testing.assert_close(logits_of(richer, torch.float32), usual, rtol=0, atol=1e-5)
    if before:
        torch.testing.assert_close(logits_of(richer), exact, rtol=0, atol=1e-9)
    else:
        torch.testing.assert_close(logits_of(richer), exact, rtol=0, atol=1e-6)

    # It takes part once the next round is over, and is saved as any other then.
    richer.train(2, lambda level, nats: None)
    assert richer.opening is None
    shares = richer.evaluate("valid").expert_share_LE
    assert all(row[-1] > 0 for row in shares) or settings == {"routing": "client"}
    again = Client("ada", place_of(client), client.data, richer.state())
    torch.testing.assert_close(logits_of(again), logits_of(richer), rtol=0, atol=0)


def test_an_opening_ends_at_one_so_that_nothing_jumps_when_the_round_is_over(tmp_path):
    client = client_of(tmp_path)
    richer, seen = with_specialists(client, 2), []
    richer.train(2, lambda level, nats: seen.append(richer.opening.clone()))
    old, new = [float(row[0]) for row in seen], [float(row[-1]) for row in seen]
    assert set(old) == {1.0} and new == sorted(new) and new[-1] == pytest.approx(1)

    # the model after its last step is the one that is saved
    after = logits_of(richer)
    richer.opening = seen[-1]
    torch.testing.assert_close(logits_of(richer), after, rtol=0, atol=1e-6)


def place_of(client):
    return workplace(client.config, client.method, load_base(client.config.base))


@pytest.mark.parametrize("before, after", [(3, 2), (2, 1), (1, 0)])
def test_losing_one_that_is_not_used_changes_no_logit(tmp_path, before, after):
    client = client_of(tmp_path, before, experts={"routing": "client"})
    for layer in (0, 1):  # another one in each block
        W = client.train_state.tensors[Slot(layer, "mlp", "router", "W")]
        W[1 + layer % before] = -1e4
    exact = logits_of(client)
    poorer = with_specialists(client, after)
    assert poorer.shape.specialists == after
    # where one expert stays alone, its B has another scale, rounded to float32
    torch.testing.assert_close(logits_of(poorer), exact, rtol=0, atol=1e-9 if after else 1e-6)
    assert (ROUTER in poorer.train_state.tensors) == (after > 0)


def test_the_least_used_goes_and_moments_and_rows_go_with_their_expert(tmp_path):
    client = client_of(tmp_path, 3)
    state = {part: dict(tensors) for part, tensors in client.state().items()}
    shares = [[0.4, 0.3, 0.1, 0.2], [0.4, 0.2, 0.3, 0.1]]
    after = lost(state, client.shape, shares)
    kept = [("s0", "s2"), ("s0", "s1")]  # of block 0 and 1
    for layer, parts in enumerate(kept):
        for new, old in zip(("s0", "s1"), parts, strict=True):
            for kind, suffixes in (("experts", [""]), ("optimizer", ["/exp_avg", "/exp_avg_sq"])):
                for suffix in suffixes:
                    one = after[kind][f"{layer}.up.{new}.B{suffix}"]
                    assert torch.equal(one, state[kind][f"{layer}.up.{old}.B{suffix}"])
        rows = [0, *(1 + int(part[1]) for part in parts)]
        for kind, name in (
            ("experts", f"{layer}.mlp.router.W"),
            ("optimizer", f"{layer}.mlp.router.W/exp_avg"),
        ):
            assert torch.equal(after[kind][name], state[kind][name][rows])
    assert not any(".s2." in name for part in after.values() for name in part)

    # What came is a copy, with its moments; its row is told apart.
    richer = with_specialists(client, 4).state()
    copied = [richer["experts"][f"1.up.s{n}.B"] for n in range(3)]
    new = richer["experts"]["1.up.s3.B"]
    (model,) = [n for n in range(3) if torch.equal(copied[n], new)]
    for kind in ("exp_avg", "exp_avg_sq", "step"):
        name = f"1.up.s{{}}.B/{kind}"
        assert torch.equal(
            richer["optimizer"][name.format(3)], richer["optimizer"][name.format(model)]
        )
    rows = richer["experts"][str(ROUTER)]
    assert not torch.equal(rows[1 + model], rows[4]) and torch.equal(
        rows[:4], client.state()["experts"][str(ROUTER)]
    )


POWER = {"clients": {"ada": {"specialists": [[2, 2], [4, 0]]}}}


@pytest.fixture(scope="module")
def changing(tmp_path_factory):
    root = tmp_path_factory.mktemp("changing")
    config = run_config(root / "text", "ada bob", conditions=POWER, rounds=4)
    return root, api.run(config, root / "run")


def test_a_client_gains_and_loses_in_a_run_which_can_be_used_after(changing):
    _, folder = changing
    trained = [line for line in folder.metrics() if line.kind == "train"]
    experts = {(t.client, t.round): t.expert_share_by_layer for t in trained}
    counts = {key: len(shares[0]) if shares else 1 for key, shares in experts.items()}
    assert [counts["ada", round] for round in (1, 2, 3, 4)] == [2, 3, 3, 2]
    assert {counts["bob", round] for round in (1, 2, 3, 4)} == {2}
    assert {n: c.specialists for n, c in folder.summary().clients.items()} == {"ada": 0, "bob": 1}
    model = api.open_personal_model(folder, "ada")
    assert {slot.part for slot in model.tensors} == {"g0", "rest", "router", "attention"}
    model.close()


def test_routes_of_a_client_that_has_gained_or_lost_are_those_of_its_model(tmp_path):
    power = {"clients": {"ada": {"specialists": [[2, 3]]}, "bob": {"specialists": [[2, 1]]}}}
    more = {"evaluation": {"keep": "last"}, "experts": {"specialists": 2}, "rounds": 2}
    whole = {"finish": "mixture"}
    config = run_config(tmp_path / "text", "ada bob", conditions=power, options=whole, **more)
    folder = api.run(config, tmp_path / "run")
    lines = [line for line in folder.metrics() if line.kind == "evaluation" and line.round == 2]
    assert len(lines) >= 2
    for name, experts in (("ada", 4), ("bob", 2)):
        (line,) = [x for x in lines if x.client == name and x.split == "test"]
        assert len(line.expert_share_by_layer[0]) == experts
        assert shared_experts(folder, name) == [experts - 1]
        assert len(routes([folder.path], [name])) == 1


def test_in_the_exchange_of_a_gain_the_model_before_it_is_measured_and_kept(tmp_path):
    config = run_config(tmp_path, "ada", evaluation={"every": 1}, rounds=4)
    base = load_base(config.base)
    place = workplace(config, load_method(config), base)
    client = Client("ada", place, prepare(config, base.encoder).load("ada"))
    client.train(1, lambda level, nats: None)
    nats = client.evaluate("valid").nats_per_token
    task = Task(round=2, train=True, evaluate=("valid",), evaluate_base=())
    richer, _ = run_task(client, task, {}, lambda event: None, specialists=2)
    assert richer.shape.specialists == 2 and richer.best.round == 1
    assert richer.best.nats == nats and richer.adopted_share == client.adopted_share
    kept = {Slot.parse(name): tensor for name, tensor in richer.best.tensors().items()}
    assert "s1" not in {slot.part for slot in kept}
    client.train_state = new_train_state(kept, config.client)
    assert client.evaluate("valid").nats_per_token == nats


def test_a_best_round_outlives_a_change_of_power_where_there_is_room_for_it(tmp_path):
    client = client_of(tmp_path, 2)
    client.best.offer(1, 2.0, client.train_state.tensors)
    richer, poorer = with_specialists(client, 3), with_specialists(client, 1)
    assert (richer.best.round, richer.best.nats) == (1, 2.0)
    richer.best.offer(2, 2.5, richer.train_state.tensors)
    assert richer.best.round == 1 and "s2" not in str(list(richer.best.tensors()))
    assert poorer.best.round == 0  # a model of two specialists is too large for it
    # what was kept before a client had gained any is not too large after it has lost that
    assert with_specialists(richer, 2).best.round == 1


def test_it_is_refused_where_a_token_uses_more_experts_than_are_left():
    tree = {"clients": [{"name": "ada", "text": "a"}], "conditions": {"specialists": [[2, 1]]}}
    with pytest.raises(UserError, match=r"conditions.specialists: 1 leaves 2 experts, but a token"):
        load_method(parse_config({**tree, "experts": {"top_k": 3, "specialists": 2}}))


@pytest.mark.parametrize(
    "conditions, experts, said",
    [
        ({"specialists_rate": 1}, {"top_k": 3, "specialists": 2}, "specialists_range: 1 leaves 2"),
        (
            {"specialists_range": [0, 1], "clients": {"ada": {"specialists_rate": 1}}},
            {"generalists": 0, "specialists": 1},
            "specialists_range: 0 leaves 0 experts",
        ),
        (
            {"groups": {"old": {"share": 0.1, "specialists": [[2, 0]]}}},
            {"generalists": 0, "specialists": 1},
            "specialists: 0 leaves 0 experts",
        ),
    ],
)
def test_wherever_a_power_may_lead_there_are_enough_experts(conditions, experts, said):
    tree = {"clients": [{"name": "ada", "text": "a"}], "options": APART, "experts": experts}
    with pytest.raises(UserError, match=f"conditions.{said}"):
        load_method(parse_config({**tree, "conditions": conditions}))
    # what another level replaces leads nowhere
    own = {"clients": {"ada": {"specialists": [[2, 2]]}}}
    load_method(parse_config({**tree, "conditions": {**conditions, **own}}))


def test_a_device_whose_owner_leaves_it_without_experts_is_refused_in_one_line():
    tree = {"clients": [{"name": "ada", "text": "a"}], "options": APART}
    config = parse_config({**tree, "experts": {"generalists": 0, "specialists": 1}})
    own = config.clients[0].model_copy(update={"specialists": 0})
    with pytest.raises(UserError, match='client "ada" has 0 experts with comigs; give it at least'):
        load_method(config.model_copy(update={"clients": (own,)}))


def test_a_device_that_is_started_with_another_number_goes_on_as_in_process(changing):
    """Over a network, by the device's own settings, as `comigs federation client` gives them."""
    root, folder = changing
    config = run_config(root / "text", "ada bob", rounds=4, conditions={})
    config = config.model_copy(
        update={
            "clients": tuple(c.model_copy(update={"weight": 1.0}) for c in config.clients),
        }
    )
    federation = Federation(root / "federation", ["ada", "bob"], root / "text")
    device = federation.trainers["ada"]
    answer = device.answer

    def restarted(raw):
        # the numbers that the schedule above has
        number = {2: 2, 4: 0}.get(request_round(raw))
        if number is not None:
            object.__setattr__(device.device, "specialists", number)
        return answer(raw)

    federation.trainers["ada"].answer = restarted
    federation.run(root / "flower", config)
    here = [line.as_json() for line in folder.metrics() if line.kind == "train"]
    there = [
        line.as_json()
        for line in type(folder).open(root / "flower").metrics()
        if line.kind == "train"
    ]
    assert there == here


def request_round(raw):
    from comigs.federation import messages
    from comigs.server import wire

    request, _ = wire.unpack(raw, messages.REQUESTS, 1 << 30)
    return request.round


def test_a_client_draws_on_from_random_numbers_of_its_own(tmp_path):
    """They are nobody else's: with the config's seed, sums could be taken apart."""
    client = client_of(tmp_path)
    place = Workplace(client.config, client.method, client.base, client.attachment)
    own = Client("ada", place, client.data, seed=77)
    changed = with_specialists(own, 3)
    drawn = [who._next_batch("experts", 0).inputs.tolist() for who in (own, changed, client)]
    assert drawn[0] == drawn[1] != drawn[2]
