"""Every method's merge, penalty and schedule against numpy in float64, through what real clients
send and receive.

W is what a client adds to a frozen linear: all that was merged, plus scale * B @ A of its LoRA,
written out whole.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch

from comigs.app import api
from comigs.client.client import Client
from comigs.data.sampling import probe_windows
from comigs.errors import Stopped, UserError
from comigs.methods import fdlora, hetlora, pcl
from comigs.methods.loading import list_methods, load_method
from comigs.methods.method import RoundContext
from comigs.server.diagnostics import drift
from comigs.server.protocol import Task
from comigs.slots import Slot
from tests import naive
from tests.conftest import APART, bits, copy_of, run_config, same, start_engine, tiny
from tests.test_lowrank import Largest

NAMES = ("ada", "bob", "cyd")
TOKENS = {"ada": 100, "bob": 300, "cyd": 1200}
SHARES = {"ada": 1 / 16, "bob": 3 / 16, "cyd": 12 / 16}
ALPHA = 5.0
QUIET = lambda level, nats: None  # noqa: E731


def config_of(root, method, ranks=(), names=NAMES, base="tiny-gpt2", experts=None, **tree):
    """One expert per client, of these ranks (else 2), unless `experts` says otherwise."""
    settings = {"rank": 2, "specialists": 0, "alpha": ALPHA, "attention_rank": 3, **(experts or {})}
    entries = {name: {"rank": rank} for name, rank in zip(names, ranks, strict=False)}
    base = {"name": base, "dtype": "float32", "device": "cpu", "threads": 1}
    return run_config(
        root, " ".join(names), entries, method=method, experts=settings, base=base, **tree
    )


def engine_of(*args, **tree):
    return start_engine(config_of(*args, **tree))


def fill(engine, seed=0):
    """Tensors that have nothing to do with each other; what is merged stays."""
    random = np.random.default_rng(seed)
    for client in engine.clients.values():
        for slot, tensor in client.train_state.tensors.items():
            if slot.role != "merged":
                tensor.copy_(torch.from_numpy(random.normal(size=tensor.shape)))


def scaled(rank, scaling="rslora"):
    return ALPHA / rank if scaling == "lora" else ALPHA / np.sqrt(rank)


def double(tensor):
    return tensor.detach().numpy().astype(np.float64)


def factors(tensors):
    """(layer, site, part) -> A and B."""
    return {
        (s.layer, s.site, s.part): (double(t), double(tensors[Slot(s.layer, s.site, s.part, "B")]))
        for s, t in tensors.items()
        if s.matrix == "A"
    }


def changes(client, scaling="rslora"):
    """(layer, site) -> W."""
    tensors = client.train_state.tensors
    total = defaultdict(float)
    for (layer, site, _), (A, B) in factors(tensors).items():
        total[layer, site] = total[layer, site] + scaled(len(A), scaling) * (B @ A)
    for slot, tensor in tensors.items():
        if slot.part == "merged":
            total[slot.layer, slot.site] = total[slot.layer, slot.site] + double(tensor)
    return dict(total)


def probed(engine, uploads, round):
    return {name: client.probe(uploads, round) for name, client in engine.clients.items()}


def exchange(engine, round=1, memory=None, missing=()):
    """What a round does after training: send, merge, receive. Returns downloads and memory."""
    clients = {name: client for name, client in engine.clients.items() if name not in missing}
    uploads = {name: client.send(round) for name, client in clients.items()}
    method = next(iter(clients.values())).method
    nats = probed(engine, uploads, round) if method.reads_peers else {}
    context = RoundContext(tuple(engine.clients), {n: TOKENS[n] for n in uploads}, nats)
    downloads, memory = method.aggregate(uploads, memory or {}, context)
    for name, client in clients.items():
        client.receive(downloads[name])
    return downloads, memory


def assert_close(mine, wanted, tolerance=1e-6):
    assert mine.keys() == wanted.keys()
    for at, value in wanted.items():
        assert np.linalg.norm(mine[at] - value) <= tolerance * np.linalg.norm(value), at


def mean_of(each, weights=None):
    weights = weights or dict.fromkeys(each, 1 / len(each))
    first = next(iter(each.values()))
    return {at: sum(weights[name] * each[name][at] for name in each) for at in first}


def truncated(matrix, rank):
    U, S, Vh = np.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def sites_of(client, role):
    return {(s.layer, s.site) for s in client.train_state.tensors if s.role == role}


# --- merges that are exact
# -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", ["rslora", "lora"])
@pytest.mark.parametrize("base", ["tiny-gpt2", "tiny-llama"])
@pytest.mark.parametrize(
    ("method", "ranks"), [("flora", (2, 3, 5)), ("flora", (2, 2, 2)), ("fedex-lora", (3, 3, 3))]
)
def test_stacking_and_the_residual_give_the_mean_of_the_products(
    tmp_path, method, ranks, base, scaling
):
    """In every linear of MLP and attention, of every client, twice in a row: W = mean of all W."""
    engine = engine_of(tmp_path, method, ranks, base=base, experts={"scaling": scaling})
    for round in (1, 2):
        fill(engine, round)
        wanted = mean_of(
            {name: changes(client, scaling) for name, client in engine.clients.items()}
        )
        exchange(engine, round)
        for client in engine.clients.values():
            assert_close(changes(client, scaling), wanted)
            assert sites_of(client, "merged") == sites_of(client, "generalist") | sites_of(
                client, "attention"
            )


@pytest.mark.parametrize("method", ["flora", "fedex-lora", "flexlora"])
@pytest.mark.parametrize("base", ["tiny-gpt2", "tiny-llama"])
def test_after_an_exact_merge_every_client_is_the_base_with_the_mean_update(tmp_path, method, base):
    """As a model: a copy of the base whose weights are changed by numpy gives the same logits."""
    rank = 16  # flexlora: no less than any product of these bases has
    engine = engine_of(
        tmp_path, method, base=base, experts={"rank": rank, "attention_rank": rank, "alpha": 0.2}
    )
    fill(engine)
    each = {name: factors(client.train_state.tensors) for name, client in engine.clients.items()}
    shares = SHARES if method == "flexlora" else dict.fromkeys(NAMES, 1 / 3)
    plain, architecture = tiny(base).model, engine.clients["ada"].base.architecture
    paths = {site: f"mlp.{name}" for site, name in architecture.mlp_linears().items()} | dict(
        architecture.attention
    )
    for layer, site, part in each["ada"]:
        linear = plain.get_submodule(architecture.blocks)[layer].get_submodule(paths[site])
        change = sum(
            shares[n] * 0.2 / 4 * (f[layer, site, part][1] @ f[layer, site, part][0])
            for n, f in each.items()
        )
        change = torch.from_numpy(change).float()
        linear.weight.data += change if isinstance(linear, torch.nn.Linear) else change.T
    exchange(engine)
    inputs = torch.randint(257, (2, 12), generator=torch.Generator().manual_seed(0))
    wanted = plain(inputs).logits
    for client in engine.clients.values():
        engine.attachment.bind(client.train_state.tensors)
        torch.testing.assert_close(
            engine.attachment.model(inputs).logits, wanted, rtol=1e-4, atol=1e-4
        )
    engine.attachment.unbind()
    assert (engine.attachment.model(inputs).logits - wanted).abs().max() > 0.1


@pytest.mark.parametrize("scaling", ["rslora", "lora"])
@pytest.mark.parametrize("base", ["tiny-gpt2", "tiny-llama"])
def test_flexlora_gives_each_client_numpys_svd_of_the_mean_weighted_by_train_tokens(
    tmp_path, base, scaling
):
    """A client whose rank is no less than the mean's gets the mean itself; attention has one rank
    for all.
    """
    engine = engine_of(tmp_path, "flexlora", (2, 5, 16), base=base, experts={"scaling": scaling})
    for round in (1, 2):
        fill(engine, round)
        mean = mean_of(
            {name: changes(client, scaling) for name, client in engine.clients.items()}, SHARES
        )
        exchange(engine, round)
        for client in engine.clients.values():
            attention = sites_of(client, "attention")
            wanted = {
                at: truncated(W, 3 if at in attention else client.shape.rank)
                for at, W in mean.items()
            }
            assert_close(changes(client, scaling), wanted)
            if client.name == "cyd":  # rank 16: nothing is cut off
                whole = mean.keys() - attention
                assert_close({at: wanted[at] for at in whole}, {at: mean[at] for at in whole})


def test_the_server_is_told_how_many_tokens_each_client_trains_on(tmp_path):
    engine = engine_of(tmp_path, "flexlora")
    replies = engine.engine.exchange(dict.fromkeys(NAMES, Task(1, True, (), ())), {}).replies
    for name, reply in replies.items():
        assert reply.train_tokens == sum(
            len(store.tokens) for store in engine.clients[name].data.train
        )
    assert len({reply.train_tokens for reply in replies.values()}) > 1


def test_a_client_that_missed_a_flexlora_round_of_smaller_ones_can_still_use_all_its_ranks(
    tmp_path,
):
    engine = engine_of(tmp_path, "flexlora", (2, 2, 9))
    fill(engine)
    downloads, _ = exchange(engine, missing=("cyd",))
    engine.clients["cyd"].receive(downloads["cyd"])
    for (_, _, part), (A, B) in factors(engine.clients["cyd"].train_state.tensors).items():
        assert np.linalg.matrix_rank(A) == len(A)
        if part != "attention":
            assert np.linalg.matrix_rank(B) == 4 and len(A) == 9


@pytest.mark.parametrize("method", ["flora", "flexlora", "fedex-lora", "hetlora"])
def test_no_server_ever_forms_a_whole_product(tmp_path, method):
    """No tensor of out x in, nor anything near it, in a merge of factors of rank 4 and less."""
    size, ranks = 400, (4, 4, 4) if method == "fedex-lora" else (2, 3, 4)
    config = config_of(tmp_path, method, ranks)
    random = np.random.default_rng(0)
    draw = lambda *shape: torch.from_numpy(random.normal(size=shape)).float()  # noqa: E731
    parts = {"g0": dict(zip(NAMES, ranks, strict=True)), "attention": dict.fromkeys(NAMES, 3)}
    uploads = {
        name: {
            Slot(0, site, part, matrix): draw(rank[name], size)
            if matrix == "A"
            else draw(size, rank[name])
            for site, (part, rank) in zip(("up", "q"), parts.items(), strict=True)
            for matrix in "AB"
        }
        for name in NAMES
    }
    with Largest() as largest:
        load_method(config).aggregate(uploads, {}, RoundContext(NAMES, TOKENS))
    assert size * 4 <= largest.elements <= size * (sum(ranks) + 4)


@pytest.mark.parametrize("method", ["rolora", "ffa-lora"])
def test_where_one_factor_rests_the_mean_of_the_other_is_the_mean_of_the_products(tmp_path, method):
    """Exactly, in each of four rounds of real training; and the resting factor is the same on all
    clients.
    """
    engine = engine_of(tmp_path, method, client={"steps": 2, "batch_size": 4, "lr": 5e-2}, rounds=4)
    for round in (1, 2, 3, 4):
        before = {
            name: copy_of(client.train_state.tensors) for name, client in engine.clients.items()
        }
        for client in engine.clients.values():
            client.train(round, QUIET)
        moves = "A" if method == "rolora" and round % 2 == 0 else "B"
        for name, client in engine.clients.items():
            assert {slot.matrix for slot in client.send(round)} == {moves}
            for slot, tensor in client.train_state.tensors.items():
                assert torch.equal(tensor, before[name][slot]) == (slot.matrix != moves)
                if slot.matrix != moves:
                    assert torch.equal(tensor, engine.clients["ada"].train_state.tensors[slot])
        each = {name: changes(client) for name, client in engine.clients.items()}
        apart = max(np.abs(each["ada"][at] - each["bob"][at]).max() for at in each["ada"])
        assert apart > 1e-3
        exchange(engine, round)
        for client in engine.clients.values():
            assert_close(changes(client), mean_of(each))
            assert same(client.train_state.tensors, engine.clients["ada"].train_state.tensors)


@pytest.mark.parametrize("wrong", ["method", "linear", "shape", "value"])
def test_an_update_that_does_not_fit_is_refused_before_anything_is_written(tmp_path, wrong):
    """In whatever company it comes."""
    client = engine_of(tmp_path, "fedavg" if wrong == "method" else "fedex-lora").clients["ada"]
    site, size = ("elsewhere" if wrong == "linear" else "up"), (1 if wrong == "shape" else 64)
    update = {
        Slot(1, site, "update", "A"): torch.ones(4, 16),
        Slot(1, site, "update", "B"): torch.ones(size, 4),
    }
    if wrong == "value":
        update[Slot(1, site, "update", "B")][0, 0] = float("nan")
    before = copy_of(client.train_state.tensors)
    download = {slot: tensor + 1 for slot, tensor in client.send(1).items()}
    with pytest.raises(AssertionError, match=r"ada: .* (may not touch|another shape|not finite)"):
        client.receive({**download, **update})
    assert same(before, client.train_state.tensors)


def test_averaging_both_factors_is_not_the_mean_of_the_products():
    """What the exact methods are for; and what the tests above would see if they were not exact."""
    random = np.random.default_rng(0)
    pairs = [(random.normal(size=(2, 7)), random.normal(size=(6, 2))) for _ in range(3)]
    exact = np.mean([B @ A for A, B in pairs], axis=0)
    plain = np.mean([B for _, B in pairs], axis=0) @ np.mean([A for A, _ in pairs], axis=0)
    assert np.linalg.norm(plain - exact) > 0.5 * np.linalg.norm(exact)


# --- who shares what
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "shared"), [("fedsa-lora", "A"), ("ffa-lora", "B")])
def test_of_a_method_that_shares_one_factor_the_other_never_leaves_or_changes_hands(
    tmp_path, method, shared
):
    engine = engine_of(tmp_path, method, client={"steps": 2, "batch_size": 4, "lr": 5e-2})
    start = copy_of(engine.clients["ada"].train_state.tensors)
    for round in (1, 2):
        for client in engine.clients.values():
            client.train(round, QUIET)
        own = {name: copy_of(client.train_state.tensors) for name, client in engine.clients.items()}
        downloads, _ = exchange(engine, round)
        for name, client in engine.clients.items():
            assert (
                {slot.matrix for slot in downloads[name]}
                == {slot.matrix for slot in client.send(round)}
                == {shared}
            )
            for slot, tensor in client.train_state.tensors.items():
                if slot.matrix == shared:
                    mean = np.mean([double(t[slot]) for t in own.values()], axis=0)
                    np.testing.assert_array_equal(double(tensor), mean.astype(np.float32))
                elif (
                    method == "ffa-lora"
                ):  # A, of attention too, is what was drawn at the very start
                    assert bits(tensor) == bits(start[slot])
                else:  # B is each client's own, and learnt
                    assert bits(tensor) == bits(own[name][slot])
                    assert not torch.equal(tensor, own["bob" if name == "ada" else "ada"][slot])
    assert {slot.role for slot in start} == {"generalist", "attention"}


def test_fedalt_keeps_the_own_lora_and_learns_beside_a_frozen_mean_of_the_others(tmp_path):
    engine = engine_of(
        tmp_path, "fedalt", client={"steps": 2, "batch_size": 4, "lr": 5e-2}, rounds=3
    )
    for round in (1, 2, 3):
        world = {
            n: {s: t for s, t in copy_of(c.train_state.tensors).items() if s.role == "rest"}
            for n, c in engine.clients.items()
        }
        for name, client in engine.clients.items():
            start = copy_of(client.train_state.tensors)
            client.train(round, QUIET)
            now = client.train_state.tensors
            assert same(
                world[name], {s: now[s] for s in world[name]}
            )  # the rest of the world is never trained
            assert {s.part for s in now if not torch.equal(now[s], start[s])} == {
                "g0",
                "attention",
                "router",
            }
        own = {name: copy_of(client.train_state.tensors) for name, client in engine.clients.items()}
        assert {slot.part for slot in engine.clients["ada"].send(round)} == {"g0", "attention"}
        exchange(engine, round)
        for name, client in engine.clients.items():
            for slot, tensor in client.train_state.tensors.items():
                if slot.part in ("g0", "router"):
                    assert bits(tensor) == bits(own[name][slot])  # never overwritten
                else:
                    part = "g0" if slot.role == "rest" else "attention"
                    source = Slot(slot.layer, slot.site, part, slot.matrix)
                    who = [n for n in NAMES if n != name or part == "attention"]
                    mean = np.mean([double(own[n][source]) for n in who], axis=0)
                    np.testing.assert_array_equal(double(tensor), mean.astype(np.float32))


def test_fedalt_refuses_more_experts_per_token_than_it_has(tmp_path):
    config = run_config(
        tmp_path, method="fedalt", experts={"rank": 2, "specialists": 2, "top_k": 3}
    )
    with pytest.raises(
        UserError,
        match=(
            r"^experts\.top_k: 3 experts per token, but client \"ada\" has 2 with fedalt; "
            r"allowed: 1 to 2"
        ),
    ):
        load_method(config)


# --- pcl
# --------------------------------------------------------------------------------------------------


def test_pcl_weighs_models_by_softmax_of_minus_perplexity(tmp_path):
    random = np.random.default_rng(0)
    slot = Slot(0, "up", "g0", "A")
    uploads = {name: {slot: torch.from_numpy(random.normal(size=(2, 5)))} for name in NAMES}
    nats = {
        "ada": {"ada": 0.1, "bob": 0.6, "cyd": 1.1},
        "bob": dict.fromkeys(NAMES, 2.0),
        "cyd": {"ada": 300.0, "bob": 0.5, "cyd": float("nan")},
    }
    downloads, memory = pcl.aggregate(uploads, {}, RoundContext(NAMES, {}, nats))
    assert memory == {}
    for reader in ("ada", "bob"):
        powers = np.array([np.exp(-np.exp(nats[reader][a])) for a in NAMES])
        wanted = sum(
            w * uploads[a][slot].numpy() for w, a in zip(powers / powers.sum(), NAMES, strict=True)
        )
        np.testing.assert_allclose(downloads[reader][slot].numpy(), wanted, rtol=1e-12)
    # exp(-exp(0.1)) = 0.3312, exp(-exp(0.6)) = 0.1617, exp(-exp(1.1)) = 0.0496: weights 0.6106,
    # 0.2980, 0.0914
    by_hand = (
        0.6106 * uploads["ada"][slot]
        + 0.2980 * uploads["bob"][slot]
        + 0.0914 * uploads["cyd"][slot]
    )
    torch.testing.assert_close(downloads["ada"][slot], by_hand, rtol=0, atol=3e-4)
    assert torch.equal(
        downloads["cyd"][slot], uploads["bob"][slot]
    )  # a model that fails counts nothing
    failing = {"ada": dict.fromkeys(NAMES, float("inf"))}
    mean = pcl.aggregate(uploads, {}, RoundContext(NAMES, {}, failing))[0]["ada"][slot]
    torch.testing.assert_close(mean, sum(u[slot] for u in uploads.values()) / 3)


def test_pcl_measures_each_model_whole_on_the_readers_valid(tmp_path):
    """The figure that decides is the loss of the author's model on text of the reader, and it
    leaves no trace.
    """
    config = config_of(tmp_path, "pcl", options={"probe_windows": 3}, experts={"alpha": 16.0})
    engine = start_engine(config)
    fill(engine)
    for client in engine.clients.values():
        for tensor in client.train_state.tensors.values():
            tensor.mul_(0.1)
    uploads = {name: client.send(1) for name, client in engine.clients.items()}
    before = {name: copy_of(client.train_state.tensors) for name, client in engine.clients.items()}
    nats = probed(engine, uploads, 1)
    assert nats == probed(engine, uploads, 1) and nats != probed(
        engine, uploads, 2
    )  # a sample for each round
    for reader, client in engine.clients.items():
        ((inputs, targets, _),) = probe_windows(config, reader, client.data, 1, 3)
        assert inputs.shape == (3, config.data.sequence_length)
        by_two = config.evaluation.model_copy(update={"batch_size": 2})
        fewer = config.model_copy(update={"evaluation": by_two})
        pieces = probe_windows(fewer, reader, client.data, 1, 3)
        assert [len(piece.inputs) for piece in pieces] == [2, 1]
        assert np.array_equal(np.concatenate([piece.inputs for piece in pieces]), inputs)
        valid = [store.tokens.tolist() for store in client.data.valid]
        for row in inputs.tolist():
            assert any(row == t[i : i + len(row)] for t in valid for i in range(len(t)))
        for author, upload in uploads.items():
            model = naive.naive_model(tiny("tiny-gpt2").model, upload, 1)
            loss = naive.mean_nats(
                model(torch.from_numpy(inputs)).logits, torch.from_numpy(targets)
            )
            assert nats[reader][author] == pytest.approx(float(loss), rel=1e-5)
        assert same(before[reader], client.train_state.tensors)


# --- penalties
# --------------------------------------------------------------------------------------------------


def pull_of_fedprox(theta, anchor):
    return {slot: 0.7 * (double(theta[slot]) - double(anchor[slot])) for slot in theta}


def pull_of_hetlora(theta, anchor):
    """d/dA[t:] = lambda |B[:, t:]| A[t:] / |A[t:]|, and the other way round; rank 5 and 0.5: t = 2,
    attention: 1.
    """
    gradients = {}
    for (layer, site, part), (A, B) in factors(theta).items():
        t = {5: 2, 3: 1}[len(A)]
        a, b = np.linalg.norm(A[t:]), np.linalg.norm(B[:, t:])
        dA, dB = np.zeros_like(A), np.zeros_like(B)
        dA[t:], dB[:, t:] = 0.4 * b * A[t:] / a, 0.4 * a * B[:, t:] / b
        gradients |= {Slot(layer, site, part, "A"): dA, Slot(layer, site, part, "B"): dB}
    return gradients


@pytest.mark.parametrize(
    ("method", "options", "pull"),
    [
        ("fedprox", {"mu": 0.7}, pull_of_fedprox),
        ("hetlora", {"penalty": 0.4, "gamma": 0.5}, pull_of_hetlora),
    ],
)
def test_a_local_step_adds_the_gradient_of_the_penalty_and_nothing_else(
    tmp_path, method, options, pull
):
    """The second step of a round, caught before AdamW: with the penalty and without, at the same
    weights.
    """
    tree = {"client": {"steps": 2, "batch_size": 4, "micro_batch_size": 2, "lr": 0.3}}
    client = engine_of(tmp_path, method, (5, 5, 5), options=options, **tree).clients["ada"]
    off = {"mu": 0} if method == "fedprox" else {"penalty": 0, "gamma": options["gamma"]}
    plain = engine_of(tmp_path, method, (5, 5, 5), options=off, **tree).clients["ada"]
    random = torch.Generator().manual_seed(0)
    download = {
        s: 0.3 * torch.randn(t.shape, generator=random)
        for s, t in client.train_state.tensors.items()
    }
    caught = []

    def catching(train_state):
        optimizer = train_state.optimizers["experts"]
        step, by_id = optimizer.step, {id(t): slot for slot, t in train_state.tensors.items()}

        def first_look():
            gradients = {by_id[id(t)]: t.grad.clone() for t in train_state.of("experts")}
            caught.append((copy_of(train_state.tensors), gradients))
            step()

        optimizer.step = first_look

    client.receive(download)
    catching(client.train_state)
    client.train(1, QUIET)
    (_, _), (theta, gradients) = caught
    caught.clear()
    plain.receive(theta)
    plain.train_state.local_steps = 1  # the same batch
    catching(plain.train_state)
    plain.train(1, QUIET)
    (same_theta, without) = caught[0]
    assert same(theta, same_theta)
    wanted = pull(theta, download)
    assert max(np.abs(g).max() for g in wanted.values()) > 0.05
    for slot, gradient in wanted.items():
        added = double(gradients[slot]) - double(without[slot])
        size = float(without[slot].abs().max()) + np.abs(gradient).max()
        np.testing.assert_allclose(added, gradient, rtol=0, atol=3e-6 * size, err_msg=str(slot))


def test_the_penalties_are_their_formulas(tmp_path):
    random = np.random.default_rng(1)
    make = lambda *shape: torch.from_numpy(random.normal(size=shape))  # noqa: E731
    tensors, anchor = (
        {
            Slot(0, "up", "g0", "A"): make(5, 7),
            Slot(0, "up", "g0", "B"): make(6, 5),
            Slot(0, "q", "attention", "A"): make(3, 7),
            Slot(0, "q", "attention", "B"): make(7, 3),
        }
        for _ in range(2)
    )
    prox = load_method(config_of(tmp_path, "fedprox", options={"mu": 0.7})).penalty(tensors, anchor)
    assert prox.item() == pytest.approx(
        0.35 * sum(((double(tensors[s]) - double(anchor[s])) ** 2).sum() for s in tensors),
        rel=1e-12,
    )
    method = load_method(config_of(tmp_path, "hetlora", options={"penalty": 0.4, "gamma": 0.5}))
    trained = {s: t.clone().requires_grad_() for s, t in tensors.items()}
    value = method.penalty(trained, anchor)

    def tails(values):
        (A, B), (C, D) = (
            (values[s], values[Slot(s.layer, s.site, s.part, "B")])
            for s in values
            if s.matrix == "A"
        )
        norm = lambda x: np.sqrt((x**2).sum())  # noqa: E731
        return 0.4 * (norm(A[2:]) * norm(B[:, 2:]) + norm(C[1:]) * norm(D[:, 1:]))

    values = {s: double(t) for s, t in tensors.items()}
    assert value.item() == pytest.approx(tails(values), rel=1e-12)
    value.backward()
    for slot, tensor in trained.items():  # finite differences at three places of each
        for index in [(0, 0), (-1, -1), (-1, 0)]:
            near = []
            for step in (1e-6, -1e-6):
                moved = {s: v.copy() for s, v in values.items()}
                moved[slot][index] += step
                near.append(tails(moved))
            assert float(tensor.grad[index]) == pytest.approx((near[0] - near[1]) / 2e-6, abs=1e-8)


def test_a_penalty_of_nothing_is_fedavg_to_the_bit(tmp_path):
    """mu = 0; lambda = 0 and gamma = 1 and equal ranks trained alike differ from fedavg in the
    merge alone.
    """
    trained = []
    for method, options in (
        ("fedavg", {}),
        ("fedprox", {"mu": 0}),
        ("hetlora", {"penalty": 0, "gamma": 1}),
    ):
        client = engine_of(tmp_path, method, options=options).clients["ada"]
        client.train(1, QUIET)
        trained.append(client.train_state.tensors)
    assert same(trained[0], trained[1]) and same(trained[0], trained[2])


# --- hetlora
# --------------------------------------------------------------------------------------------------


def zero_padded(matrix, rows, columns):
    result = np.zeros((rows, columns))
    result[: matrix.shape[0], : matrix.shape[1]] = matrix
    return result


def test_hetlora_pads_weighs_by_the_norm_of_the_product_and_gives_first_rows(tmp_path):
    ranks = {"ada": 2, "bob": 3, "cyd": 5}
    engine = engine_of(tmp_path, "hetlora", tuple(ranks.values()))
    fill(engine)
    for slot, tensor in engine.clients["bob"].train_state.tensors.items():
        tensor.mul_(
            {"A": 0.2, "B": 3}[slot.matrix]
        )  # weights by each factor's own norm would come out otherwise
    each = {name: factors(client.train_state.tensors) for name, client in engine.clients.items()}
    exchange(engine)
    for at in each["ada"]:
        for f in each.values():  # layers apply 16 / sqrt(rank): B counts as it acts
            f[at] = (f[at][0], f[at][1] * 16 / np.sqrt(len(f[at][0])))
        largest = 3 if at[2] == "attention" else 5
        norms = {name: np.linalg.norm(f[at][1] @ f[at][0]) for name, f in each.items()}
        total = sum(norms.values())
        A = sum(
            norms[n] / total * zero_padded(f[at][0], largest, f[at][0].shape[1])
            for n, f in each.items()
        )
        B = sum(
            norms[n] / total * zero_padded(f[at][1], f[at][1].shape[0], largest)
            for n, f in each.items()
        )
        for name, client in engine.clients.items():
            own = 3 if at[2] == "attention" else ranks[name]
            mine = factors(client.train_state.tensors)[at]
            np.testing.assert_allclose(mine[0], A[:own], rtol=0, atol=1e-6 * np.abs(A).max())
            acts = mine[1] * 16 / np.sqrt(own)
            np.testing.assert_allclose(acts, B[:, :own], rtol=0, atol=1e-6 * np.abs(B).max())


@pytest.mark.parametrize("factor", [0.5, 0.999, 1.0, 1.001, 2.0])
@pytest.mark.parametrize(
    ("rank", "gamma", "t"), [(5, 0.5, 2), (5, 0.99, 4), (16, 0.99, 15), (1, 0.5, 1), (4, 1.0, 4)]
)
def test_hetlora_prunes_where_the_tails_product_of_norms_shrank_and_only_there(
    tmp_path, rank, gamma, t, factor
):
    after_training = load_method(
        config_of(tmp_path, "hetlora", options={"gamma": gamma})
    ).after_training
    if gamma == 1:
        assert after_training is None
        return
    random = np.random.default_rng(rank)
    A, B, C, D = (
        Slot(0, site, part, m) for site, part in (("up", "g0"), ("q", "attention")) for m in "AB"
    )
    anchor = {
        A: random.normal(size=(rank, 7)),
        B: random.normal(size=(6, rank)),
        C: random.normal(size=(3, 7)),
        D: random.normal(size=(7, 3)),
    }
    now = {slot: value.copy() for slot, value in anchor.items()}
    now[A][t:] *= 3 * factor  # one factor may grow while the product shrinks
    now[B][:, t:] /= 3
    now[A][:t] *= 0.1  # what is before the tail does not matter
    tensors = [
        {slot: torch.from_numpy(v) for slot, v in values.items()} for values in (now, anchor)
    ]
    after = after_training(*tensors)
    pruned = factor < 1 and t < rank
    assert after.keys() == now.keys()
    assert np.array_equal(after[A][:t], now[A][:t]) and np.array_equal(
        after[B][:, :t], now[B][:, :t]
    )
    if t < rank and factor != 1:  # at 1, rounding decides
        assert (not after[A][t:].any() and not after[B][:, t:].any()) == pruned
    for slot in (C, D):  # another linear's tail is its own affair
        assert np.array_equal(after[slot], now[slot])


def alive(client):
    """(layer, site, part) -> the ranks that are not zero in both factors."""
    return {
        at: int(np.flatnonzero(A.any(axis=1) | B.any(axis=0)).max(initial=-1)) + 1
        for at, (A, B) in factors(client.train_state.tensors).items()
    }


STRONG = {"penalty": 2.0, "gamma": 0.6}
FAST = {"steps": 3, "batch_size": 4, "lr": 2e-2}


def test_what_hetlora_pruned_stays_pruned_through_rounds_downloads_and_absence(tmp_path):
    """Training, AdamW's moments, downloads from clients that have more, and a round missed, revive
    nothing.
    """
    engine = engine_of(tmp_path, "hetlora", (3, 5, 8), options=STRONG, client=FAST, rounds=6)
    ever, memory = {name: alive(client) for name, client in engine.clients.items()}, {}
    for round in range(1, 7):
        missing = {4: ("bob",), 5: ("cyd",)}.get(round, ())
        for name, client in engine.clients.items():
            if name not in missing:
                client.train(round, QUIET)
        downloads, memory = exchange(engine, round, memory, missing)
        for name in missing:
            if name in downloads:
                engine.clients[name].receive(downloads[name])
        for name, client in engine.clients.items():
            for at, ranks in alive(client).items():
                assert 1 <= ranks <= ever[name][at], (round, name, at)
                ever[name][at] = ranks
            for slot, tensor in client.train_state.tensors.items():
                moments = client.train_state.optimizers["experts"].state[tensor]
                rows = ever[name][slot.layer, slot.site, slot.part]
                dead = (
                    (lambda t, r=rows: t[r:])
                    if slot.matrix == "A"
                    else (lambda t, r=rows: t[:, r:])
                )
                assert not any(dead(moments[key]).any() for key in ("exp_avg", "exp_avg_sq"))
    full = {name: client.shape.rank for name, client in engine.clients.items()}
    pruned = [n for n in NAMES for at, r in ever[n].items() if at[2] == "g0" and r < full[n]]
    assert set(pruned) == set(NAMES)
    assert any(r > 1 for ranks in ever.values() for r in ranks.values())


def test_the_hetlora_server_remembers_who_pruned_what_while_they_are_gone(tmp_path):
    """Others still use the ranks that bob has pruned; a round that he misses gives him none of them
    back.
    """
    engine = engine_of(tmp_path, "hetlora", (5, 5, 5))
    fill(engine)
    for slot, tensor in engine.clients["bob"].train_state.tensors.items():
        (tensor if slot.matrix == "A" else tensor.T)[2:] = 0
    _, memory = exchange(engine)
    fill(engine, 1)
    packed = safetensors.torch.load(safetensors.torch.save(dict(memory)))
    downloads, _ = exchange(engine, 2, packed, missing=("bob",))
    engine.clients["bob"].receive(downloads["bob"])
    assert set(alive(engine.clients["bob"]).values()) == {2}
    assert set(alive(engine.clients["ada"]).values()) == {3, 5}  # attention and MLP
    for slot, tensor in downloads["bob"].items():
        mine, theirs = (t if slot.matrix == "A" else t.T for t in (tensor, downloads["ada"][slot]))
        assert torch.equal(mine[:2], theirs[:2])


def test_hetlora_never_zeroes_ranks_that_a_client_did_not_prune(tmp_path):
    """Where all who use them are gone, there is nothing to give: such a client keeps what it
    has.
    """
    engine = engine_of(
        tmp_path, "hetlora", (2, 2, 5), options={"penalty": 0}, client=FAST, rounds=3
    )
    memory = {}
    for round, missing in ((1, ("cyd",)), (2, ()), (3, ("cyd",)), (4, ())):
        for name, client in engine.clients.items():
            if name not in missing:
                client.train(round, QUIET)
        before = alive(engine.clients["cyd"])
        downloads, memory = exchange(engine, round, memory, missing)
        assert set(downloads) == set(NAMES) - set(missing)
        assert alive(engine.clients["cyd"]) == before
    engine = engine_of(tmp_path, "hetlora", (2, 5, 5), options={"penalty": 0})
    fill(engine)
    assert set(exchange(engine, missing=("cyd",))[0]) == set(NAMES)  # bob has them all


def test_a_pruning_run_gone_on_with_equals_one_never_stopped(tmp_path):
    config = config_of(tmp_path, "hetlora", (3, 5, 8), options=STRONG, client=FAST, rounds=4)

    def stop(event):
        if event.kind == "step" and (event.round, event.client) == (4, "bob"):
            raise KeyboardInterrupt

    api.run(config, tmp_path / "whole")
    with pytest.raises(Stopped):
        api.run(config, tmp_path / "stopped", report=stop)
    api.resume(tmp_path / "stopped")
    dead = 0
    for name in NAMES:
        one, other = (personal(tmp_path / run, name) for run in ("whole", "stopped"))
        assert same(one, other)
        dead += sum(not row.any() for slot, t in one.items() if slot.endswith("g0.A") for row in t)
    assert dead > 0


def personal(run, name):
    return safetensors.torch.load_file(run / "clients" / name / "personal.safetensors")


def test_a_tail_starts_at_the_floor_and_leaves_a_rank():
    for rank, gamma, t in ((8, 0.99, 7), (100, 0.99, 99), (3, 0.5, 1), (1, 0.1, 1), (7, 1.0, 7)):
        pair = (torch.ones(rank, 4), torch.ones(5, rank))
        assert hetlora.tail_start(pair, gamma) == t
    padded = (
        torch.cat([torch.ones(4, 3), torch.zeros(4, 3)]),
        torch.cat([torch.ones(5, 4), torch.zeros(5, 4)], dim=1),
    )
    assert (
        hetlora.used_rank(padded) == 4 and hetlora.tail_start(padded, 0.5) == 2
    )  # of the ranks still used


# --- fdlora
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimum", [(0.5, 0.5), (-1.0, 1.0), (0.25, -0.75), (1.0, 1.0), (3.0, -0.2), (0.0, 0.0)]
)
def test_the_search_finds_an_optimum_inside_the_square_within_its_evaluations(optimum):
    """For a bowl, the point of [-1, 1]^2 nearest to its bottom."""
    asked = []

    def cost(at):
        asked.append(at)
        return (at[0] - optimum[0]) ** 2 + (at[1] - optimum[1]) ** 2

    found = fdlora.compass_search(cost, 40)
    wanted = np.clip(optimum, -1, 1)
    assert np.abs(np.array(found) - wanted).max() <= 1 / 16
    assert len(asked) <= 40 and len(set(asked)) == len(asked)  # nothing is asked twice
    assert all(abs(x) <= 1 and abs(y) <= 1 for x, y in asked)
    assert cost(found) == min(map(cost, asked[:40]))


@pytest.mark.parametrize("evaluations", [1, 2, 10, 11])
def test_the_search_asks_as_often_as_it_may_and_returns_the_best(evaluations):
    asked = {}

    def rugged(at):
        asked[at] = np.sin(13 * at[0]) + np.cos(7 * at[1]) * at[0]
        return asked[at]

    found = fdlora.compass_search(rugged, evaluations)
    assert len(asked) == evaluations and asked[found] == min(asked.values())
    assert next(iter(asked)) == (1.0, 1.0)  # the plain sum first


def test_the_search_ends_however_many_evaluations_it_is_given():
    asked = []
    found = fdlora.compass_search(
        lambda at: asked.append(at) or abs(at[0] - 1 / 3) + abs(at[1] + 1 / 7), 10**6
    )
    assert len(asked) < 1000 and np.abs(np.array(found) - (1 / 3, -1 / 7)).max() < 1e-5


def test_a_cost_that_is_no_number_is_never_chosen():
    assert fdlora.compass_search(lambda at: float("nan") if at[0] < 1 else at[1] ** 2, 12)[0] == 1.0


def valid_cost(client, tensors, weights, l1):
    """Nats per token of the client's valid, by the plain model of one expert, plus L1."""
    whole = added(tensors)
    model = naive.naive_model(tiny("tiny-gpt2").model, whole, 1, ALPHA)
    (store,) = client.data.valid
    tokens, length, nats = (
        torch.from_numpy(store.tokens.astype(np.int64)),
        client.config.data.sequence_length,
        0.0,
    )
    for start in range(0, len(tokens) - 1, length):
        window = tokens[start : start + length + 1]
        logits = model(window[None, :-1]).logits
        nats += float(naive.mean_nats(logits, window[None, 1:])) * (len(window) - 1)
    return nats / (len(tokens) - 1) + l1 * (abs(weights[0]) + abs(weights[1]))


def added(tensors):
    """g0 and s0 as one expert g0: the rows of both A's, the columns of both scaled B's, for the
    scale of the whole.
    """
    whole = {slot: t for slot, t in tensors.items() if slot.role == "attention"}
    for slot in (s for s in tensors if s.part == "g0" and s.matrix == "A"):
        pairs = [
            (
                tensors[Slot(slot.layer, slot.site, p, "A")],
                tensors[Slot(slot.layer, slot.site, p, "B")],
            )
            for p in ("g0", "s0")
        ]
        total = sum(len(A) for A, _ in pairs)
        whole[slot] = torch.cat([A for A, _ in pairs])
        scales = [float(scaled(len(A)) / scaled(total)) for A, _ in pairs]
        whole[Slot(slot.layer, slot.site, "g0", "B")] = torch.cat(
            [s * B for s, (_, B) in zip(scales, pairs, strict=True)], dim=1
        )
    return whole


def test_fdlora_finishes_once_with_weights_no_worse_on_valid_and_that_is_the_personal_model(
    tmp_path, monkeypatch
):
    """Two ranks, so two scales. Seen from outside: what finish was given, what it left, and what
    the run keeps.
    """
    options = {"evaluations": 9, "l1": 0.05}
    config = config_of(
        tmp_path,
        "fdlora",
        names=("ada", "bob"),
        options=options,
        rounds=3,
        evaluation={"keep": "last"},
        experts={"specialists": 1, "specialist_rank": 4},
        client={"steps": 4, "batch_size": 4, "lr": 5e-2},
    )
    finish, finished = Client.finish, []

    def watched(client):
        before = copy_of(client.train_state.tensors)
        finish(client)
        finished.append((client, before, copy_of(client.train_state.tensors)))
        if crash and len(finished) == crash:
            raise KeyboardInterrupt

    monkeypatch.setattr(Client, "finish", watched)
    crash = 0
    run = api.run(config, tmp_path / "run")
    assert [client.name for client, *_ in finished] == ["ada", "bob"]
    chosen = []
    for client, before, after in finished:
        w = {}
        for slot, tensor in after.items():
            part = {"specialist": 0, "generalist": 1}.get(slot.role)
            if slot.matrix == "B" and part is not None:
                ratio = (
                    double(tensor).ravel()
                    @ double(before[slot]).ravel()
                    / (double(before[slot]) ** 2).sum()
                )
                assert w.setdefault(part, ratio) == pytest.approx(ratio, abs=1e-6)
                np.testing.assert_allclose(double(tensor), ratio * double(before[slot]), atol=1e-7)
            else:
                assert bits(tensor) == bits(before[slot])
        assert max(map(abs, w.values())) <= 1
        unfused, fused = (
            valid_cost(client, before, (1, 1), 0.05),
            valid_cost(client, after, (w[0], w[1]), 0.05),
        )
        assert fused <= unfused + 1e-6
        chosen.append((round(w[0], 6), round(w[1], 6)))
        assert same({str(s): t for s, t in after.items()}, personal(run.path, client.name))
    assert any(weights != (1.0, 1.0) for weights in chosen)

    api.resume(run.path)
    assert len(finished) == 2  # a finished run is not finished again
    finished.clear()
    crash = 1
    with pytest.raises(Stopped):
        api.run(config, tmp_path / "stopped")
    crash = 0
    api.resume(tmp_path / "stopped")
    for name in ("ada", "bob"):  # stopped while finishing, and finished from the last round again
        assert same(personal(run.path, name), personal(tmp_path / "stopped", name))


# --- centralized, pfedmoe
# --------------------------------------------------------------------------------------------


def caught_gradients(client, round=1):
    """Train a round of one step; the gradients as AdamW got them, and the batch."""
    caught, draw = {}, client._next_batch
    optimizer = client.train_state.optimizers["experts"]
    step, by_id = optimizer.step, {id(t): slot for slot, t in client.train_state.tensors.items()}

    def first_look():
        caught["gradients"] = {
            by_id[id(t)]: t.grad.clone() for t in client.train_state.of("experts")
        }
        step()

    def drawing(level, number):
        caught["batch"] = draw(level, number)
        return caught["batch"]

    optimizer.step, client._next_batch = first_look, drawing
    client.train(round, QUIET)
    return caught["gradients"], caught["batch"]


def test_a_centralized_step_is_the_gradient_over_a_batch_of_everybodys_text(tmp_path):
    tree = {"client": {"steps": 1, "batch_size": 6, "lr": 5e-3}}
    engine = engine_of(tmp_path, "centralized", **tree)
    assert engine.trainers == {"ada"}
    client = engine.clients["ada"]
    random = torch.Generator().manual_seed(3)
    for tensor in client.train_state.tensors.values():
        tensor.copy_(0.1 * torch.randn(tensor.shape, generator=random))
    start = {slot: t.clone().requires_grad_() for slot, t in client.train_state.tensors.items()}
    gradients, (inputs, targets, _) = caught_gradients(client)
    assert inputs.shape == (3 * 6, 12)
    texts = {
        name: np.asarray(c.data.train[0].tokens).tolist() for name, c in engine.clients.items()
    }
    owners = []
    for row, last in zip(inputs.tolist(), targets[:, -1].tolist(), strict=True):
        window = [*row, last]
        owners += [
            n for n, t in texts.items() if any(window == t[i : i + 13] for i in range(len(t)))
        ]
    assert len(owners) == 18 and set(owners) == set(NAMES)
    model = naive.naive_model(tiny("tiny-gpt2").model, start, 1, ALPHA)
    naive.mean_nats(model(torch.from_numpy(inputs)).logits, torch.from_numpy(targets)).backward()
    for slot, tensor in start.items():
        torch.testing.assert_close(gradients[slot], tensor.grad, rtol=1e-4, atol=1e-5)


def test_a_centralized_run_trains_one_model_that_everybody_ends_with(tmp_path):
    events, config = [], config_of(tmp_path, "centralized", rounds=2)
    run = api.run(config, tmp_path / "run", report=events.append)
    assert {event.client for event in events if event.kind in ("step", "train")} == {"ada"}
    models = [personal(run.path, name) for name in NAMES]
    assert same(models[0], models[1]) and same(models[0], models[2])
    start = {str(s): t for s, t in start_engine(config).clients["ada"].train_state.tensors.items()}
    assert not same(models[0], start)
    trained = [event.trained_tokens for event in events if event.kind == "train"]
    assert trained == [2 * 3 * 4 * 12] * 2  # steps, clients, windows, tokens
    measured = {e.client for e in events if e.kind == "evaluation" and e.model == "personal"}
    assert measured == set(NAMES)


def test_pfedmoe_teaches_the_router_with_train_and_never_reads_valid(tmp_path):
    """comigs does the reverse: the same look at both."""
    theirs = start_engine(run_config(tmp_path, "bob")).clients["bob"].data
    for method in ("pfedmoe", "comigs"):
        trained = {}
        for changed in ("nothing", "train", "valid"):
            settings = {"steps": 2, "batch_size": 4, "router_every": 2, "lr": 5e-3}
            engine = engine_of(
                tmp_path,
                method,
                names=("ada",),
                experts={"specialists": 1},
                client=settings,
                options=APART if method == "comigs" else {},
            )
            client, random = engine.clients["ada"], torch.Generator().manual_seed(0)
            for tensor in (
                client.train_state.tensors.values()
            ):  # experts that differ, so that routing matters
                tensor += 0.1 * torch.randn(tensor.shape, generator=random)
            start = copy_of(client.train_state.tensors)
            if changed != "nothing":
                client.text = replace(client.text, **{changed: getattr(theirs, changed)})
            log = client.train(1, QUIET)
            assert len(log.router_losses) == (2 if method == "comigs" else 0)
            trained[changed] = {
                s: t for s, t in client.train_state.tensors.items() if s.role == "router"
            }
            assert not any(
                torch.equal(t, start[s]) for s, t in trained[changed].items()
            )  # the router learns
        assert same(trained["nothing"], trained["valid"]) == (method == "pfedmoe")
        assert not same(
            trained["nothing"], trained["train"]
        )  # by itself, or through the experts that it weighs


def test_what_a_comigs_client_adopts_is_one_share_of_a_download_judged_on_its_own_valid(tmp_path):
    """Seen from outside: all generalists went the same share of the way, none private moved, and no
    worse is found.

    Attention LoRA is the download's. The windows are those of its valid that the round draws.
    """
    options = {"adopt": "valid", "probe_windows": 4, **APART}
    client = engine_of(tmp_path, "comigs", experts={"specialists": 1}, options=options).clients[
        "ada"
    ]
    client.train(1, QUIET)
    own, random = copy_of(client.train_state.tensors), torch.Generator().manual_seed(0)
    download = {
        s: t + 0.02 * torch.randn(t.shape, generator=random) for s, t in client.send(1).items()
    }
    client.receive(download, 2)
    experts = {s: t for s, t in download.items() if s.role == "generalist"}
    way = sum(((double(experts[s]) - double(own[s])) ** 2).sum() for s in experts)
    gone = sum(
        (
            (double(client.train_state.tensors[s]) - double(own[s])) * (double(t) - double(own[s]))
        ).sum()
        for s, t in experts.items()
    )
    share = gone / way
    for slot, tensor in client.train_state.tensors.items():
        if slot.role == "attention":
            assert bits(tensor) == bits(download[slot])
        elif slot in download:
            wanted = double(own[slot]) + share * (double(download[slot]) - double(own[slot]))
            np.testing.assert_allclose(double(tensor), wanted, rtol=0, atol=1e-6)
        else:
            assert bits(tensor) == bits(own[slot])
    ((inputs, targets, _),) = probe_windows(client.config, "ada", client.data, 2, 4)

    def nats(share):
        tensors = {
            **own,
            **download,
            **{s: torch.lerp(own[s], t, share) for s, t in experts.items()},
        }
        model = naive.naive_model(tiny("tiny-gpt2").model, tensors, 2, ALPHA)
        return float(
            naive.mean_nats(model(torch.from_numpy(inputs)).logits, torch.from_numpy(targets))
        )

    assert 0 <= share <= 1 and nats(share) <= min(map(nats, (0.0, 0.5, 1.0))) + 1e-6


# --- all methods
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list_methods())
def test_a_round_in_which_nobody_sends_anything_is_no_error(tmp_path, name):
    engine = engine_of(tmp_path, name)
    method = engine.clients["ada"].method
    uploads = {n: c.send(1) for n, c in engine.clients.items() if n in engine.trainers}
    tokens, nats = dict.fromkeys(uploads, 100), {n: dict.fromkeys(uploads, 1.0) for n in NAMES}
    downloads, memory = method.aggregate(uploads, {}, RoundContext(NAMES, tokens, nats))
    empty, after = method.aggregate({}, memory, RoundContext(NAMES, {}, {n: {} for n in NAMES}))
    assert all(download == {} for download in empty.values())
    assert same(dict(memory), dict(after))
    assert drift({}, downloads) is None


@pytest.mark.parametrize(
    ("method", "given", "told"),
    [
        ("fedprox", {"mu": -1}, "options.mu: given -1; must be 0.0 or more"),
        ("fedprox", {"mu": "strong"}, "options.mu: given 'strong'; must be a number"),
        (
            "fedprox",
            {"nu": 0.1},
            'options.nu: "fedprox" has no such option. Did you mean "mu"? Its options: mu',
        ),
        ("hetlora", {"gamma": 0}, "options.gamma: given 0; must be above 0"),
        ("hetlora", {"gamma": 1.5}, "options.gamma: given 1.5; must be 1.0 or less"),
        ("hetlora", {"penalty": -0.5}, "options.penalty: given -0.5; must be 0.0 or more"),
        ("hetlora", {"penality": 0.5}, 'Did you mean "penalty"? Its options: penalty, gamma'),
        ("pcl", {"probe_windows": 0}, "options.probe_windows: given 0; must be 1 or more"),
        ("pcl", {"probe_windows": 2.5}, "options.probe_windows: given 2.5; must be a whole number"),
        ("fdlora", {"evaluations": 0}, "options.evaluations: given 0; must be 1 or more"),
        ("fdlora", {"l1": -1}, "options.l1: given -1; must be 0.0 or more"),
        ("fedavg", {"mu": 0.1}, 'options.mu: "fedavg" has no such option. Its options: none'),
        ("flora", {"rank": 3}, 'options.rank: "flora" has no such option. Its options: none'),
    ],
)
def test_an_option_that_is_unknown_or_out_of_range_is_told_in_one_line(
    tmp_path, method, given, told
):
    with pytest.raises(UserError) as raised:
        load_method(run_config(tmp_path, method=method, options=given))
    assert told in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_option_that_is_no_finite_number_is_refused(tmp_path, value):
    with pytest.raises(UserError, match=r"options\.mu"):
        load_method(run_config(tmp_path, method="fedprox", options={"mu": value}))
