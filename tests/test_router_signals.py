"""What a router learns from where there is no valid: a prior of similar clients, and the entropy of
predictions.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from comigs.app import api
from comigs.client import loss as loss_module
from comigs.client.door import checked_prior
from comigs.client.entropy import sum_entropy
from comigs.client.loss import Windows
from comigs.client.objective import CROSS_ENTROPY, Objective, kl_divergence, objective_of
from comigs.client.state import new_train_state
from comigs.client.steps import MethodHooks, StepSettings, accumulate, gradients_for, step
from comigs.config import ClientSection, parse_config
from comigs.data.batches import Batch
from comigs.data.examples import IGNORED
from comigs.engines.in_process import InProcess
from comigs.errors import UserError
from comigs.methods.loading import load_method
from comigs.runs.metrics import RoundEnd, Train
from comigs.server.routing_prior import cosine, latest_priors, priors_of_round, weighted_mean
from comigs.slots import Slot
from tests.conftest import APART, attach, copy_of, random_tensors, run_config, same, shape_of, tiny
from tests.fake_engine import train_of
from tests.runs import outcome, refused

NAMES = "ada bob cyd"
ASKS = {"cyd": {"router_data": "prior"}}
A, B = Slot(0, "up", "g0", "A"), Slot(0, "up", "g0", "B")
ROUTER, ROUTER_1 = Slot(0, "mlp", "router", "W"), Slot(1, "mlp", "router", "W")
SHAPES = {A: (2, 3), B: (4, 2), ROUTER: (2, 8), ROUTER_1: (2, 8)}


class Toy:
    """A client with experts that differ, in float64, and what a router step would do to it."""

    def __init__(self, shape=None, top_k=2, **settings):
        base = tiny("tiny-gpt2", "float64")
        self.attachment = attach(base.model, base.architecture, top_k)
        tensors = random_tensors(self.attachment, shape or shape_of(1, 1), True, dtype=base.dtype)
        self.client = ClientSection(**{"balance_coef": 0.0, "weight_decay": 0.0, **settings})
        self.state = new_train_state(tensors, self.client)
        self.plan = StepSettings(self.client, 1e-2, 1e-2, 100, base.dtype)
        self.attachment.bind(tensors)
        random = np.random.default_rng(3)
        self.batch = Batch(*(random.integers(0, 257, (3, 5)) for _ in range(2)))

    def gradients(self, objective):
        """Of the routers, by slot."""
        with gradients_for(self.state, ("router",), lambda slot: True):
            outcome = accumulate(self.attachment, self.plan, self.batch, objective)
            made = {s: t.grad.clone() for s, t in self.state.tensors.items() if t.grad is not None}
        return outcome.nats, made

    def weights(self):
        """The mean routing weights of the batch, (L, E)."""
        with torch.no_grad():
            self.attachment.model(torch.from_numpy(self.batch.inputs))
        return torch.stack([r.weights_TE.mean(dim=0) for r in self.attachment.routings()]).double()


def naive_gradients(toy, value):
    """Of the routers, of `value(logits (B, L, V), list of weights (T, E))`, by autograd alone."""
    trained = {s: t.requires_grad_() for s, t in copy_of(toy.state.tensors).items()}
    toy.attachment.bind(trained)
    logits = toy.attachment.model(torch.from_numpy(toy.batch.inputs)).logits
    made = value(logits, [r.weights_TE for r in toy.attachment.routings()])
    made.backward()
    toy.attachment.bind(toy.state.tensors)
    return float(made.detach()), {s: t.grad for s, t in trained.items() if s.role == "router"}


def close(ours, plain, tolerance=1e-7):
    assert ours.keys() == plain.keys() and len(ours) == 2
    for slot, gradient in plain.items():
        assert gradient.abs().max() > 100 * tolerance  # there is something to compare
        torch.testing.assert_close(ours[slot], gradient, rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", [None, 1, 2])
def test_the_gradient_of_entropy_is_that_of_plain_autograd(monkeypatch, size):
    """Over several chunks of tokens and pieces of a batch."""
    monkeypatch.setattr(loss_module, "CHUNK", 4 * 257)
    toy = Toy(micro_batch_size=size)

    def value(logits, _):
        return torch.distributions.Categorical(logits=logits).entropy().mean()

    nats, gradients = toy.gradients(Objective(sum_entropy))
    plain, naive = naive_gradients(toy, value)
    assert nats == pytest.approx(plain, abs=1e-7)
    close(gradients, naive)


def test_entropy_asks_for_no_targets_and_counts_what_is_learnt_alone():
    toy = Toy()
    inputs, targets = (torch.from_numpy(part) for part in toy.batch[:2])
    places = torch.arange(5).expand(3, 5)
    some = torch.where(places > 2, targets, IGNORED)
    others = torch.where(places > 2, (targets + 7) % 257, IGNORED)
    whole = float(sum_entropy(toy.attachment.model, Windows(inputs, targets)))
    part, same_part = (
        float(sum_entropy(toy.attachment.model, Windows(inputs, t, places))) for t in (some, others)
    )
    logits = toy.attachment.model(inputs).logits
    each = torch.distributions.Categorical(logits=logits).entropy()
    assert part == same_part == pytest.approx(float(each[:, 3:].sum()), rel=1e-6)
    assert whole == pytest.approx(float(each.sum()), rel=1e-6)


PRIOR = torch.tensor([[0.3, 0.7], [0.9, 0.1]], dtype=torch.float64)
PRIOR_OF_3 = torch.tensor([[0.2, 0.5, 0.3], [0.0, 0.4, 0.6]], dtype=torch.float64)


@pytest.mark.parametrize("size", [None, 1, 2])
@pytest.mark.parametrize("prior_LE", [PRIOR, PRIOR_OF_3], ids=["2 of 2", "2 of 3"])
def test_the_gradient_of_the_prior_is_the_whole_batchs_by_plain_autograd(prior_LE, size):
    toy = Toy(shape_of(1, prior_LE.shape[1] - 1), micro_batch_size=size)

    def value(logits, weights):
        targets = torch.from_numpy(toy.batch.targets)
        nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        terms = []
        for prior_E, weights_TE in zip(prior_LE, weights, strict=True):
            mean_E = weights_TE.mean(dim=0)
            terms += [
                p * torch.log(p / mean) for p, mean in zip(prior_E, mean_E, strict=True) if p > 0
            ]
        return nats + 0.7 * sum(terms) / len(prior_LE)

    _, gradients = toy.gradients(Objective(prior_LE=prior_LE, prior_coef=0.7))
    close(gradients, naive_gradients(toy, value)[1], tolerance=1e-6)


def test_a_prior_is_reached_where_nothing_else_pulls():
    toy = Toy()

    def nothing(model, windows):
        model.base_model(input_ids=windows.inputs)
        return torch.zeros((), dtype=torch.float64)

    hooks = MethodHooks(router=Objective(nothing, PRIOR, 1.0))
    before = (toy.weights() - PRIOR).abs().max()
    for _ in range(200):
        step(toy.attachment, toy.state, toy.plan, hooks, ("router",), toy.batch)
    assert before > 0.1
    torch.testing.assert_close(toy.weights(), PRIOR, rtol=0, atol=1e-3)


def test_the_divergence_is_zero_at_the_prior_alone_and_finite_everywhere():
    even, odd = torch.tensor([0.5, 0.5]), torch.tensor([0.0, 1.0])
    assert kl_divergence(even, even) == 0 < kl_divergence(even, torch.tensor([0.4, 0.6]))
    assert kl_divergence(odd, odd) == 0 and bool(kl_divergence(even, odd).isfinite())
    # With one expert a token, weights sum to less than 1; their shares are what counts.
    assert float(kl_divergence(even, 0.6 * even)) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("source", ["prior", "entropy"])
def test_a_router_waits_until_experts_differ(source):
    toy = Toy()
    for slot, tensor in toy.state.tensors.items():
        if slot.matrix == "B":
            tensor.zero_()
    start = copy_of(toy.state.tensors)
    client = toy.client.model_copy(update={"router_data": source})
    hooks = MethodHooks(router=objective_of(client, PRIOR))
    step(toy.attachment, toy.state, toy.plan, hooks, ("router",), toy.batch)
    assert same(toy.state.tensors, start)
    toy.state.tensors[B].fill_(0.1)
    step(toy.attachment, toy.state, toy.plan, hooks, ("router",), toy.batch)
    changed = {slot.role for slot, t in toy.state.tensors.items() if not t.equal(start[slot])}
    assert changed == {"router", "generalist"}  # the generalist was changed here, by hand


def test_local_steps_and_other_sources_know_nothing_of_it():
    for source in ("valid", "train", "crossfit"):
        assert objective_of(ClientSection(router_data=source), PRIOR) is CROSS_ENTROPY
    assert objective_of(ClientSection(router_data="prior"), None) is CROSS_ENTROPY
    toy, other = Toy(), Toy()
    hooks = MethodHooks(router=Objective(sum_entropy, PRIOR, 9.0))
    for levels in (("experts",), ("experts", "router")):
        step(toy.attachment, toy.state, toy.plan, hooks, levels, toy.batch)
        step(other.attachment, other.state, other.plan, MethodHooks(), levels, other.batch)
    assert same(toy.state.tensors, other.state.tensors)


# The server's side


def line(client, share, round=3):
    told = {**train_of(round, client), "expert_share_by_layer": share}
    return Train(**told, uploaded_bytes=0, downloaded_bytes=0)


def priors(shares, steps, entries=ASKS, sent=None, shapes=None):
    """What the server makes of these reports and of uploads that are `steps` from nothing."""
    config = run_config_of(entries)
    uploads = {name: {A: torch.tensor(numbers)} for name, numbers in steps.items()}
    return priors_of_round(
        config,
        {name: (shapes or {}).get(name, SHAPES) for name in NAMES.split()},
        uploads,
        sent or {},
        lambda slot, dims: torch.zeros(dims),
        [line(name, share) for name, share in shares.items()],
    )


def run_config_of(entries):
    clients = [{"name": n, "text": n, **entries.get(n, {})} for n in NAMES.split()]
    return parse_config({"clients": clients})


HERE, THERE = [[0.2, 0.8], [0.6, 0.4]], [[0.9, 0.1], [0.5, 0.5]]


def test_a_prior_is_the_mean_of_similar_clients_as_numpy_computes_it():
    random = np.random.default_rng(0)
    own, ada, bob = (random.normal(size=(2, 3)).astype(np.float32) for _ in range(3))
    ada += own
    bob += 2 * own
    made = priors({"ada": HERE, "bob": THERE, "cyd": HERE}, {"ada": ada, "bob": bob, "cyd": own})
    cosines = [
        float((own * other).sum(dtype=float) / np.linalg.norm(own) / np.linalg.norm(other))
        for other in (ada, bob)
    ]
    assert min(cosines) > 0
    expected = (cosines[0] * np.array(HERE) + cosines[1] * np.array(THERE)) / sum(cosines)
    assert made.keys() == {"cyd"}
    np.testing.assert_allclose(made["cyd"], expected, atol=1e-6)
    np.testing.assert_allclose(np.sum(made["cyd"], axis=1), 1, atol=1e-12)


def test_a_prior_is_never_above_one_however_it_is_rounded():
    random = np.random.default_rng(0)
    sure = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    for _ in range(200):
        (mean,) = weighted_mean([(float(cosine), sure) for cosine in random.uniform(0, 1, 6)])
        assert max(mean) <= 1 and sum(mean) == pytest.approx(1)


def test_who_goes_the_other_way_has_no_say_and_without_any_likeness_all_count_alike():
    x, y = [[1.0, 0, 0], [0, 0, 0]], [[0, 1.0, 0], [0, 0, 0]]
    away = [[-1.0, 0, 0], [0, 0, 0]]
    shares = {"ada": HERE, "bob": THERE, "cyd": HERE}
    assert priors(shares, {"ada": x, "bob": away, "cyd": x})["cyd"] == HERE
    alike = priors(shares, {"ada": y, "bob": y, "cyd": x})["cyd"]
    np.testing.assert_allclose(alike, (np.array(HERE) + np.array(THERE)) / 2)
    still = [[0.0, 0, 0], [0, 0, 0]]
    assert cosine({A: torch.tensor(still)}, {A: torch.tensor(x)}) == 0


def test_a_step_is_from_the_download_and_only_what_both_have_is_compared():
    x, y = torch.tensor([[1.0, 0, 0], [0, 0, 0]]), torch.tensor([[0, 1.0, 0], [0, 0, 0]])
    sent = {"ada": {A: y - x}, "cyd": {A: y - x}}
    shares = {"ada": HERE, "bob": THERE}
    made = priors(shares, {"ada": y.tolist(), "bob": y.tolist(), "cyd": y.tolist()}, sent=sent)
    # ada and cyd went x from what they were sent, bob went y from the common start
    assert made["cyd"] == HERE
    assert cosine({A: x}, {A: x, B: y}) == 1 and cosine({A: x}, {A: x[:1]}) == 0


@pytest.mark.parametrize(
    "share",
    [None, [[0.5, 0.5]], [[0.2, 0.3, 0.5]] * 2, [[0.5, 0.5], [1.0]], [[0.0, 0.0], [0.5, 0.5]]],
    ids=repr,
)
def test_what_is_no_mean_of_these_routers_is_left_out(share):
    ones = [[1.0] * 3] * 2
    steps = {"ada": ones, "bob": ones, "cyd": ones}
    assert priors({"ada": share, "bob": THERE}, steps)["cyd"] == THERE
    assert priors({"ada": share}, steps) is None


def test_what_is_told_sums_to_one_whatever_clients_claim():
    ones = [[1.0] * 3] * 2
    lie = [[1.01, -0.01], [1.01, 1.01]]
    made = priors({"ada": lie, "bob": lie}, {"ada": ones, "bob": ones, "cyd": ones})["cyd"]
    assert made == [[1.0, 0.0], [0.5, 0.5]]


def test_nobody_is_told_anything_who_does_not_ask_and_only_valid_is_told():
    ones = [[1.0] * 3] * 2
    steps = {"ada": ones, "bob": ones, "cyd": ones}
    shares = {"ada": HERE, "bob": THERE, "cyd": THERE}
    assert priors(shares, steps, entries={}) is None
    entries = {**ASKS, "bob": {"router_data": "train"}}
    assert priors(shares, steps, entries) == {"cyd": HERE}
    # who is away this time is told nothing new, and nothing is told of who is away
    assert priors(shares, {"ada": ones, "bob": ones}) is None
    assert priors(shares, {"bob": ones, "cyd": ones}) == {"cyd": THERE}


def test_the_newest_prior_of_each_client_counts():
    ends = [
        RoundEnd(round=n, prior=prior)
        for n, prior in enumerate([{"cyd": HERE, "bob": HERE}, None, {"cyd": THERE}], start=1)
    ]
    newest = latest_priors(ends)
    assert newest == {"bob": tuple(map(tuple, HERE)), "cyd": tuple(map(tuple, THERE))}


# At the client's door


@pytest.mark.parametrize(
    "prior",
    [
        [[0.5, 0.6], [0.5, 0.5]],
        [[-0.5, 1.5], [0.5, 0.5]],
        [[float("nan"), 0.5], [0.5, 0.5]],
        [[float("inf"), 0.5], [0.5, 0.5]],
    ],
    ids=repr,
)
def test_a_client_takes_no_weights_that_are_none(prior):
    own = {ROUTER: torch.zeros(2, 8), ROUTER_1: torch.zeros(2, 8)}
    with pytest.raises(AssertionError, match="ada: a prior whose weights do not sum to 1"):
        checked_prior("ada", prior, own)


def test_a_client_passes_over_a_prior_for_other_experts_than_it_has_now():
    own = {ROUTER: torch.zeros(2, 8), ROUTER_1: torch.zeros(2, 8)}
    for prior in (HERE[:1], [[1.0], [1.0]], [[0.2, 0.3, 0.5]] * 2, [], None):
        assert checked_prior("ada", prior, own) is None
    assert checked_prior("ada", HERE, {A: torch.zeros(2, 3)}) is None
    assert checked_prior("ada", [], {A: torch.zeros(2, 3)}) is None
    assert checked_prior("ada", HERE, own).tolist() == HERE


# Whole runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run in which one of three clients has no valid to learn from."""
    root = tmp_path_factory.mktemp("prior")
    config = run_config(root / "text", NAMES, ASKS, rounds=4, client={"prior_coef": 20.0})
    return root, config, api.run(config, root / "run")


def test_a_run_tells_the_client_what_the_others_reported_and_the_client_follows(run):
    root, _, folder = run
    lines = folder.metrics()
    ends = [line for line in lines if line.kind == "server"]
    assert all(list(end.prior) == ["cyd"] for end in ends)
    trained = {(line.client, line.round): line for line in lines if line.kind == "train"}
    for end in ends:
        shares = [trained[name, end.round].expert_share_by_layer for name in ("ada", "bob")]
        low, high = np.min(shares, axis=0) - 1e-6, np.max(shares, axis=0) + 1e-6
        assert (low <= end.prior["cyd"]).all() and (end.prior["cyd"] <= high).all()

    # Without a prior the same router ends further from what the others say.
    alone = {"cyd": {"router_data": "train"}}
    other = api.run(run_config(root / "text", NAMES, alone, rounds=4), root / "alone")
    last = {line.client: line for line in other.metrics() if line.kind == "train"}
    target = np.array(ends[-2].prior["cyd"])
    held, free = (
        np.abs(np.array(of.expert_share_by_layer) - target).max()
        for of in (trained["cyd", 4], last["cyd"])
    )
    assert held < free

    # Whom nobody asks of anything trains in round 1 as if there were no priors.
    first = {line.client: line for line in reversed(other.metrics()) if line.kind == "train"}
    assert first["cyd"].train_nats_per_token == trained["cyd", 1].train_nats_per_token


def test_a_stopped_run_goes_on_with_the_same_priors(run, tmp_path, monkeypatch):
    _, config, folder = run
    exchange = InProcess.exchange

    def stopping(self, tasks, downloads):
        if max(task.round for task in tasks.values()) == 3:
            raise KeyboardInterrupt
        return exchange(self, tasks, downloads)

    monkeypatch.setattr(InProcess, "exchange", stopping)
    with pytest.raises(UserError):
        api.run(config, tmp_path / "run")
    monkeypatch.setattr(InProcess, "exchange", exchange)
    api.resume(tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(folder.path)


@pytest.mark.slow  # processes that each import all of transformers
def test_processes_beside_this_one_are_told_the_same(run, tmp_path):
    _, config, folder = run
    api.run(config.model_copy(update={"workers": 2}), tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(folder.path)


def test_entropy_trains_the_router_from_train_without_its_targets(tmp_path):
    tree = {"options": APART}
    config = run_config(tmp_path / "text", "ada", client={"router_data": "entropy"}, **tree)
    made = api.run(config, tmp_path / "run")
    phases = [line.router_nats_per_token for line in made.metrics() if line.kind == "train"]
    assert len(phases) == 2 and all(0 < nats < np.log(257) for nats in phases)
    train = api.run(
        run_config(tmp_path / "text", "ada", client={"router_data": "train"}, **tree),
        tmp_path / "train",
    )
    own, other = (folder.load("clients/ada/personal") for folder in (made, train))
    assert not any(own[name].equal(other[name]) for name in own if ".router." in name)


def test_bad_input_is_one_line(tmp_path, capsys):
    for entries, client, field in [
        ({}, {"router_data": "prior"}, 'client.router_data: given "prior"'),
        (
            {"ada": {"router_data": "prior", "specialists": 2}},
            {},
            'clients.ada.router_data: given "prior"',
        ),
    ]:
        with pytest.raises(UserError) as told:
            load_method(run_config(tmp_path / "text", "ada bob", entries, client=client))
        assert str(told.value).startswith(field) and "\n" not in str(told.value)
        assert "learns from valid" in str(told.value)
    # Methods that have no phases of a router, and a device that knows of itself alone, do not ask.
    for method in ("fedavg", "pfedmoe"):
        load_method(run_config(tmp_path / "text", client={"router_data": "prior"}, method=method))
    load_method(run_config(tmp_path / "text", "ada", client={"router_data": "prior"}))


def test_a_word_that_is_none_of_the_sources_is_refused(tmp_path, capsys):
    (tmp_path / "run.toml").write_text(
        '[client]\nrouter_data = "priors"\n[[clients]]\nname = "ada"\ntext = "ada"\n'
    )
    line = refused(capsys, "run", tmp_path / "run.toml", "--out", tmp_path / "out")
    assert "client.router_data: given 'priors'" in line and 'Did you mean "prior"?' in line
    assert not (tmp_path / "out").exists()
