"""`options.specialists = "on-top"`: a client's own expert is its generalists with a specialist on
top, and the router weighs it against everybody's generalists.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from comigs.app import api
from comigs.client.power import with_specialists
from comigs.errors import UserError
from comigs.experts.attach import Layout
from comigs.methods.alone import candidates
from comigs.methods.comigs import towards
from comigs.slots import OTHERS, Slot, experts_of
from tests import conftest
from tests.conftest import random_tensors, run_config, shape_of, start_engine, tiny
from tests.exports import exported, trained
from tests.naive import naive_model
from tests.test_power import client_of, logits_of

ON_TOP = {"options": {"specialists": "on-top"}}


attach = partial(conftest.attach, layout=Layout(on_top=True))


def shape_on_top(specialists, generalists=1, rank=3, specialist_rank=2):
    shape = shape_of(generalists, specialists, rank, specialist_rank)
    return shape.model_copy(update={"others": "gated"})


def apart(tensors, specialists, generalists=1):
    """The same experts as the naive model wants them: each one LoRA, with its scale in B."""
    named, whole = {str(slot): tensor for slot, tensor in tensors.items()}, {}
    g = [f"g{number}" for number in range(generalists)]
    own = [[*g, f"s{number}"] for number in range(specialists)] or [g]
    places = {slot.layer: set() for slot in tensors}
    for slot in tensors:
        if slot.part == OTHERS:
            places[slot.layer].add(slot.site)
    for layer, sites in places.items():
        for number, parts in enumerate([*own, ["rest"]]):
            for site in sites:
                A = torch.cat([named[f"{layer}.{site}.{part}.A"] for part in parts])
                B = torch.cat([named[f"{layer}.{site}.{part}.B"] for part in parts], dim=1)
                ranks = sum(len(named[f"{layer}.{site}.{part}.A"]) for part in own[0])
                whole[f"{layer}.{site}.g{number}.A"] = A
                whole[f"{layer}.{site}.g{number}.B"] = B * math.sqrt(len(A) / ranks)
        whole[f"{layer}.mlp.router.W"] = named[f"{layer}.mlp.router.W"]
    return {**whole, **{name: tensor for name, tensor in named.items() if ".attention." in name}}


@pytest.mark.parametrize(
    "generalists, specialists, top_k",
    [(1, 1, 2), (1, 2, 2), (1, 3, 2), (2, 2, 3), (2, 0, 2), (1, 2, 1)],
)
@pytest.mark.parametrize("base", ["tiny-gpt2", "tiny-llama"])
def test_each_own_expert_is_a_mlp_with_both_lora_and_the_others_are_one_more(
    base, generalists, specialists, top_k
):
    base = tiny(base)
    base.model.double()
    shape, ids = shape_on_top(specialists, generalists), torch.arange(18).reshape(2, 9)
    experts = {"rank": 3, "specialists": specialists, "specialist_rank": 2}
    with attach(base.model, base.architecture, top_k, routing="client", **experts) as attachment:
        tensors = random_tensors(attachment, shape, routed=True, dtype=torch.float64)
        tensors = {slot: torch.ones_like(t) if slot.is_gate else t for slot, t in tensors.items()}
        attachment.bind(tensors)
        with torch.no_grad():
            logits = base.model(ids).logits
    naive = naive_model(
        base.model,
        apart(tensors, specialists, generalists),
        top_k,
        routing="client",
        lead=math.log(9),
    )
    with torch.no_grad():
        torch.testing.assert_close(logits, naive(ids).logits, rtol=0, atol=1e-6)
    base.model.float()


def test_everybodys_generalists_have_one_scale_however_many_specialists_a_client_has():
    """What the server averages must mean the same at every client."""
    base = tiny("tiny-gpt2")
    with attach(base.model, base.architecture, rank=3, strength="together") as attachment:
        scales = set()
        for specialists, rank in ((0, 2), (1, 2), (2, 2), (3, 5)):
            shape = shape_on_top(specialists, specialist_rank=rank)
            attachment.bind(random_tensors(attachment, shape, routed=True))
            scales |= {lora.scale for m in attachment.mixtures for lora in m.bound.loras}
    assert scales == {16 / math.sqrt(3 + 4)}  # of a generalist and a specialist as configured


@pytest.mark.parametrize(
    "experts, entries, total",
    [
        ({"specialists": 0}, {"ada": {"specialists": 1}, "bob": {}}, 2),
        ({"specialists": 0}, {"ada": {}, "bob": {}}, 2),
        ({}, {"ada": {"rank": 3}, "bob": {"rank": 3, "specialists": 0}}, 5),
        ({}, {"ada": {"rank": 3}, "bob": {"rank": 3, "specialists": 3}}, 5),
        ({}, {"ada": {"specialist_rank": 7}, "bob": {}}, 4),
        ({"generalists": 2}, {"ada": {"specialists": 0}, "bob": {}}, 6),
    ],
)
def test_all_clients_of_a_config_have_that_scale_and_what_is_sent_has_it_too(
    tmp_path, experts, entries, total
):
    experts = {"rank": 2, "specialist_rank": 2, **experts}
    run = start_engine(run_config(tmp_path, entries=entries, experts=experts))
    for client in run.clients.values():
        own = client.train_state.tensors
        sent = {slot: t for slot, t in own.items() if client.method.shares(slot)}
        for tensors in (own, sent):
            client.attachment.bind(tensors)
            loras = [lora for m in client.attachment.mixtures for lora in m.bound.loras]
            assert {lora.scale for lora in loras} == {16 / math.sqrt(total)}, client.name


@pytest.mark.parametrize("method", ["comigs-others", "fedalt"])
@pytest.mark.parametrize("spelling", ["all", "each"])
def test_where_nothing_is_on_top_an_own_expert_has_its_own_scale(tmp_path, method, spelling):
    """However it is said that no client has specialists."""
    experts, entries = {"rank": 3, "specialists": 0}, {}
    if spelling == "each":
        experts, entries = {"rank": 3}, {name: {"specialists": 0} for name in ("ada", "bob")}
    run = start_engine(run_config(tmp_path, entries=entries, method=method, experts=experts))
    client = run.clients["ada"]
    client.attachment.bind(client.train_state.tensors)
    loras = [lora for m in client.attachment.mixtures for lora in m.bound.loras]
    assert {lora.scale for lora in loras} == {16 / math.sqrt(3)}


@pytest.mark.parametrize("generalists", [1, 2])
def test_what_is_sent_is_by_itself_the_own_expert_with_nothing_on_top(generalists):
    base, experts = tiny("tiny-gpt2"), {"generalists": generalists, "rank": 3, "specialist_rank": 2}
    with attach(base.model, base.architecture, **experts) as attachment:
        tensors = random_tensors(attachment, shape_on_top(1, generalists), routed=True)
        sent = {s: t for s, t in tensors.items() if s.role in ("generalist", "attention")}
        for slot, tensor in tensors.items():
            if slot.is_gate or (slot.role == "specialist" and slot.matrix == "B"):
                tensor.zero_()

        def says(model):
            attachment.bind(model)
            with torch.no_grad():
                return base.model(torch.arange(18).reshape(2, 9)).logits

        expected = says(tensors)
        assert not torch.allclose(says(sent), expected, atol=1e-3)  # experts of another method
        attachment.layout = Layout(on_top=True, beside_others=True)
        torch.testing.assert_close(says(sent), expected, rtol=0, atol=1e-5)


def test_the_experts_are_named_in_the_routers_order():
    assert experts_of(["g0", "s0", "s1", "rest"]) == [("g0", "s0"), ("g0", "s1"), ("rest",)]
    assert experts_of(["g0", "g1", "rest"]) == [("g0", "g1"), ("rest",)]
    assert experts_of(["g0", "s0"]) == [("g0",), ("s0",)]
    assert shape_on_top(0).num_experts == shape_on_top(1).num_experts == 2


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_specialist_fades_as_far_as_a_download_is_adopted(tmp_path, share):
    client = start_engine(run_config(tmp_path, **ON_TOP)).clients["ada"]
    client.train(1, lambda level, nats: None)
    own = {slot: tensor.clone() for slot, tensor in client.train_state.tensors.items()}
    download = {slot: tensor + 0.1 for slot, tensor in client.send(1).items()}
    assert {slot.role for slot in download} == {"generalist", "attention"}
    mixed = towards(own, download, share)
    specialist = Slot(1, "up", "s0", "B")
    assert bool(own[specialist].any())
    torch.testing.assert_close(mixed[specialist], (1 - share) * own[specialist])
    # where all is adopted, the model is the one that the server's generalists alone make
    client.method = client.method.__class__(
        **{**vars(client.method), "mix": lambda own, download, nats: (mixed, share)}
    )
    client.receive(download, 2)
    assert client.adopted_share == share
    if share == 1:
        assert not client.train_state.tensors[specialist].any()


def test_what_a_download_brings_is_the_others_expert_whose_gate_is_as_far_open_as_it_is_left(
    tmp_path,
):
    client = start_engine(run_config(tmp_path, experts={"generalists": 2}, **ON_TOP)).clients["ada"]
    client.train(1, lambda level, nats: None)
    download = {slot: tensor + 0.1 for slot, tensor in client.send(1).items()}
    client.receive(download, 2)
    tensors = client.train_state.tensors
    for matrix, dim in (("A", 0), ("B", 1)):
        parts = [download[Slot(0, "down", part, matrix)] for part in ("g0", "g1")]
        assert torch.equal(tensors[Slot(0, "down", OTHERS, matrix)], torch.cat(parts, dim=dim))
    assert {float(t) for slot, t in tensors.items() if slot.is_gate} == {1 - client.adopted_share}


@pytest.mark.parametrize(
    "settings, before, after",
    [
        ({}, 0, 1),
        ({}, 1, 2),
        ({}, 0, 2),
        ({}, 2, 4),
        ({"top_k": 3}, 2, 3),
        ({"top_k": 1}, 1, 2),
        ({"routing": "sequence"}, 1, 2),
        ({"routing": "client"}, 1, 2),
    ],
)
def test_gaining_one_on_top_changes_no_logit(tmp_path, settings, before, after):
    client = client_of(tmp_path, before, experts=settings, **ON_TOP)
    open_others(client)
    exact = logits_of(client)
    richer = with_specialists(client, after)
    assert richer.shape.specialists == after and richer.shape.num_experts == after + 1
    # a changed scale's B is rounded to float32
    torch.testing.assert_close(logits_of(richer), exact, rtol=0, atol=1e-9 if before > 1 else 1e-6)
    richer.train(2, lambda level, nats: None)
    shares = richer.evaluate("valid").expert_share_LE
    assert all(len(row) == after + 1 for row in shares)
    # Where one of them is used by a token, or no token is told apart, it may be another one.
    is_used = all(min(row[:after]) > 0 for row in shares)
    assert is_used or settings in ({"routing": "client"}, {"top_k": 1})


@pytest.mark.parametrize("before, after", [(3, 2), (2, 1)])
def test_losing_one_that_is_not_used_changes_no_logit(tmp_path, before, after):
    client = client_of(tmp_path, before, experts={"routing": "client"}, **ON_TOP)
    for layer in (0, 1):
        client.train_state.tensors[Slot(layer, "mlp", "router", "W")][layer % before] = -1e4
    open_others(client)
    exact = logits_of(client)
    poorer = with_specialists(client, after)
    assert poorer.shape.num_experts == after + 1
    torch.testing.assert_close(logits_of(poorer), exact, rtol=0, atol=1e-9 if after > 1 else 1e-6)


def test_without_its_last_specialist_a_clients_own_expert_is_its_generalist(tmp_path):
    client = client_of(tmp_path, 1, **ON_TOP)
    open_others(client)
    for slot, tensor in client.train_state.tensors.items():
        if slot.role == "specialist" and slot.matrix == "B":
            tensor.zero_()
    exact = logits_of(client)
    poorer = with_specialists(client, 0)
    assert poorer.shape.num_experts == 2
    torch.testing.assert_close(logits_of(poorer), exact, rtol=0, atol=1e-6)


def open_others(client):
    """Make the others' expert one that is used."""
    random = torch.Generator().manual_seed(3)
    for slot, tensor in client.train_state.tensors.items():
        if slot.is_gate:
            tensor.fill_(0.7)
        elif slot.part == OTHERS:
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=random))


def test_at_the_end_a_client_may_keep_its_own_expert_its_generalist_or_the_others(tmp_path):
    base = tiny("tiny-gpt2")
    with attach(base.model, base.architecture, rank=3, specialist_rank=2) as attachment:
        tensors = random_tensors(attachment, shape_on_top(2, generalists=2), routed=True)
        models, names = zip(*candidates(tensors), strict=True)
        whole, first, second, generalist, others, attention, nothing = models
        own = ("own expert 0", "own expert 1", "generalists", "everybody's generalists")
        assert names == (None, *own, "attention LoRA", "base")

        def says(model):
            attachment.bind(model)
            with torch.no_grad():
                return base.model(torch.arange(18).reshape(2, 9)).logits

        def single(parts):
            """One expert of these parts, with the scale that they have here."""
            model = {s: t for s, t in tensors.items() if s.role == "attention"}
            for slot, tensor in tensors.items():
                if slot.part in parts:
                    number = parts.index(slot.part)
                    model[Slot(slot.layer, slot.site, f"g{number}", slot.matrix)] = tensor
            return model

        for found, parts in (
            (first, ["g0", "g1", "s0"]),
            (second, ["g0", "g1", "s1"]),
            (generalist, ["g0", "g1"]),
            (others, ["rest"]),
        ):
            attachment.layout = Layout(summed=True, on_top=True)
            model = single(parts)
            # Our own experts have one scale, that of their ranks together.
            expected = {
                slot: t * math.sqrt(len(model[Slot(slot.layer, slot.site, slot.part, "A")]) / 8)
                if slot.matrix == "B" and slot.role == "generalist"
                else t
                for slot, t in model.items()
            }
            alone = says(expected)
            attachment.layout = Layout(on_top=True)
            torch.testing.assert_close(says(found), alone, rtol=0, atol=1e-4)
        assert not torch.allclose(says(whole), says(first), atol=1e-3)
        torch.testing.assert_close(says(nothing), says({}))
        assert not torch.allclose(says(attention), says(nothing))


def test_a_download_that_is_taken_whole_leaves_nothing_on_top(tmp_path):
    options = {"specialists": "on-top", "adopt": "all"}
    with pytest.raises(UserError, match=r'options\.adopt: given "all" beside .*must be "valid"'):
        start_engine(run_config(tmp_path, options=options))


def test_a_run_can_be_exported_and_read(tmp_path):
    run = trained("on-top")
    with_own = api.open_personal_model(run, "ann")
    assert [len(m.bound.experts) for m in with_own.attachment.mixtures] == [2, 2]
    for form in ("peft", "flat", "transformers"):
        done = exported(run, form, tmp_path / form)
        assert done.exact == (form == "peft") and done.export < done.base
        assert abs(done.export / done.personal - 1) < 0.05
    names = sorted(path.name for path in (tmp_path / "peft").iterdir() if path.is_dir())
    assert names == ["attention", "generalist-0-specialist-0", "rest"]
