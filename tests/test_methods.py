"""Each method by itself: who shares what, the exact numbers of its merge, and what it refuses."""

from __future__ import annotations

import sys
import weakref
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch

from comigs.app import api
from comigs.app.setup import say_unread
from comigs.errors import UserError
from comigs.methods.loading import list_methods, load_method
from comigs.methods.merging import mean, mean_of_uploads
from comigs.methods.method import RoundContext
from comigs.runs.metrics import Evaluation
from comigs.slots import Slot
from tests.conftest import bits, run_config, start_engine

NAMES = tuple(f"c{i}" for i in range(10))
A, B = Slot(0, "up", "g0", "A"), Slot(0, "up", "g0", "B")


def uploads_of(num_clients, dtype=torch.float32, seed=0):
    random = np.random.default_rng(seed)
    draw = lambda *shape: torch.from_numpy(random.normal(size=shape)).to(dtype)  # noqa: E731
    return {f"c{i}": {A: draw(2, 5), B: draw(7, 2)} for i in range(num_clients)}


@pytest.mark.parametrize("num_clients", [1, 2, 3, 7])
def test_the_mean_is_numpys(num_clients):
    uploads = uploads_of(num_clients)
    downloads, memory = mean_of_uploads(uploads, {}, RoundContext(tuple(uploads)))
    assert list(downloads) == list(uploads) and memory == {}
    for slot in (A, B):
        expected = np.mean([u[slot].numpy().astype(np.float64) for u in uploads.values()], axis=0)
        for download in downloads.values():
            assert download[slot].dtype == torch.float32
            np.testing.assert_array_equal(download[slot].numpy(), expected.astype(np.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_clients", [1, 2, 3, 5, 10])
def test_the_mean_of_equal_uploads_is_the_upload_to_the_bit(num_clients, dtype):
    upload = {A: (torch.randn(40, 50, generator=torch.Generator().manual_seed(0)) * 1e-3).to(dtype)}
    downloads, _ = mean_of_uploads(
        {f"c{i}": upload for i in range(num_clients)}, {}, RoundContext(NAMES[:num_clients])
    )
    assert all(bits(download[A]) == bits(upload[A]) for download in downloads.values())


def test_the_mean_does_not_depend_on_the_order_of_clients():
    uploads = uploads_of(7)
    downloads, _ = mean_of_uploads(uploads, {}, RoundContext(tuple(uploads)))
    backwards, _ = mean_of_uploads(
        dict(reversed(uploads.items())), {}, RoundContext(tuple(uploads))
    )
    assert all(bits(downloads["c0"][slot]) == bits(backwards["c0"][slot]) for slot in (A, B))


@pytest.mark.parametrize("num_clients", [1, 2, 3, 4, 7, 8])
def test_the_median_is_numpys(num_clients):
    uploads = uploads_of(num_clients)
    median = mean(uploads.values(), "median")
    for slot in (A, B):
        expected = np.median([u[slot].numpy().astype(np.float64) for u in uploads.values()], axis=0)
        np.testing.assert_array_equal(median[slot].numpy(), expected.astype(np.float32))


@pytest.mark.parametrize(
    ("num_clients", "trim", "cut"),
    [(1, 0.4, 0), (3, 0.25, 0), (4, 0.25, 1), (8, 0.25, 2), (7, 0.3, 2), (5, 0, 0)],
)
def test_the_trimmed_mean_is_the_mean_without_the_largest_and_smallest(num_clients, trim, cut):
    uploads = uploads_of(num_clients)
    trimmed = mean(uploads.values(), "trimmed", trim)
    for slot in (A, B):
        values = np.sort([u[slot].numpy().astype(np.float64) for u in uploads.values()], axis=0)
        expected = np.mean(values[cut : num_clients - cut], axis=0)
        np.testing.assert_array_equal(trimmed[slot].numpy(), expected.astype(np.float32))


def test_one_upload_is_looked_at_after_the_other():
    """Whatever is kept of an upload is in the sum: they may come from the disk one by one."""
    uploads, alive = uploads_of(9), []

    def one_by_one():
        for upload in uploads.values():
            copy = {slot: tensor.clone() for slot, tensor in upload.items()}
            alive.append([weakref.ref(tensor) for tensor in copy.values()])
            yield copy
            del copy
            assert sum(ref() is not None for refs in alive[:-1] for ref in refs) == 0

    result, whole = mean(one_by_one()), mean(uploads.values())
    assert all(bits(result[slot]) == bits(whole[slot]) for slot in (A, B))


def test_uploads_of_other_slots_are_never_averaged():
    uploads = uploads_of(2)
    with pytest.raises(AssertionError, match="clients share different slots"):
        mean([uploads["c0"], {A: uploads["c1"][A]}])


ROBUST = [
    "comigs",
    "comigs-others",
    "fdlora",
    "fedalt",
    "fedavg",
    "fedprox",
    "fedsa-lora",
    "ffa-lora",
    "local",
    "pfedmoe",
    "rolora",
]


@pytest.mark.parametrize("how", ["trimmed", "median"])
@pytest.mark.parametrize("name", list_methods())
def test_who_averages_can_do_so_robustly_and_who_does_not_refuses_before_anything_runs(
    tmp_path, name, how
):
    options = {"attention": "mean"} if name == "comigs" else {}
    config = run_config(tmp_path, method=name, upload={"merge": how}, options=options)
    if name not in ROBUST:
        with pytest.raises(
            UserError, match=f'^upload.merge: given "{how}", but {name} merges in its own way'
        ):
            load_method(config)
        return
    method, names = load_method(config), NAMES[:6]
    shared = [
        s for s in (A, Slot(0, "up", "g1", "A"), Slot(0, "q", "attention", "A")) if method.shares(s)
    ]
    random = torch.Generator().manual_seed(0)
    uploads = {n: {slot: torch.randn(3, 4, generator=random) for slot in shared} for n in names}
    uploads["c5"] = {slot: t * 1e6 for slot, t in uploads["c5"].items()}  # a liar
    downloads, _ = method.aggregate(uploads, {}, RoundContext(names, upload=config.upload))
    received = [t for download in downloads.values() for t in download.values()]
    assert all(float(t.abs().max()) < 10 for t in received) and bool(received) == bool(shared)


def roles_shared(config):
    client = next(iter(start_engine(config).clients.values()))
    return {slot.role for slot in client.send(1)}, {
        slot.role for slot in client.train_state.tensors
    }


@pytest.mark.parametrize(
    ("method", "experts", "shared", "held"),
    [
        (
            "comigs",
            {},
            {"generalist", "attention"},
            {"generalist", "specialist", "rest", "router", "attention"},
        ),
        (
            "comigs",
            {"specialists": 0, "generalists": 2},
            {"generalist", "attention"},
            {"generalist", "rest", "router", "attention"},
        ),
        (
            "comigs",
            {"specialists": 2, "generalists": 0, "share_attention": False},
            set(),
            {"specialist", "router", "attention"},
        ),
        (
            "comigs",
            {"share_attention": False},
            {"generalist"},
            {"generalist", "specialist", "rest", "router", "attention"},
        ),
        ("fedavg", {}, {"generalist", "attention"}, {"generalist", "attention"}),
        ("local", {}, set(), {"specialist", "attention"}),
    ],
)
def test_what_is_shared_and_what_is_held(tmp_path, method, experts, shared, held):
    assert roles_shared(run_config(tmp_path, method=method, experts={"rank": 2, **experts})) == (
        shared,
        held,
    )


@pytest.mark.parametrize("method", ["fdlora", "pfedmoe"])
def test_a_method_of_two_kinds_of_experts_is_refused_without_generalists(tmp_path, method):
    config = run_config(tmp_path, method=method, experts={"generalists": 0, "specialists": 2})
    with pytest.raises(
        UserError, match=rf"^experts\.generalists: given 0, but {method} is .* 1 or"
    ):
        load_method(config)


def test_where_nothing_can_be_on_top_a_line_says_so(tmp_path):
    said = []
    for options in ({}, {"specialists": "apart"}):
        for generalists in (0, 1):
            experts = {"generalists": generalists, "specialists": 2}
            config = run_config(tmp_path, experts=experts, options=options)
            say_unread(config, "in-process", said.append)
    assert [line for line in said if "specialists are apart" in line] == [
        "experts.generalists is 0, so there is nothing to be on top of: specialists are apart"
    ]


@pytest.mark.parametrize("method", list_methods())
def test_every_method_trains_as_many_scalars_in_experts_and_attention(tmp_path, method):
    """A fair comparison: the same budget, a router aside."""

    def budget(name):
        client = start_engine(run_config(tmp_path, "ada", method=name)).clients["ada"]
        tensors = client.train_state.tensors.items()
        router = sum(t.numel() for s, t in tensors if s.role == "router" and not s.is_frozen)
        return client.trained_parameters([1, 2]) - router

    if method == "ffa-lora":  # it rests A: of each linear only B, (out, rank), is trained
        client = start_engine(run_config(tmp_path, "ada", method=method)).clients["ada"]
        assert budget(method) == sum(
            t.numel() for slot, t in client.train_state.tensors.items() if slot.matrix == "B"
        )
    else:
        assert budget(method) == budget("comigs")


def test_clients_may_have_different_numbers_and_ranks_of_specialists(tmp_path):
    entries = {"ada": {"specialists": 3, "specialist_rank": 4}, "bob": {"specialists": 0}}
    engine = start_engine(run_config(tmp_path, entries=entries))
    uploads = {name: client.send(1) for name, client in engine.clients.items()}
    downloads, _ = engine.clients["ada"].method.aggregate(uploads, {}, RoundContext(tuple(uploads)))
    for name, client in engine.clients.items():
        client.receive(downloads[name])
    assert (
        engine.clients["ada"].shape.num_experts == 4
        and engine.clients["bob"].shape.num_experts == 2
    )


@pytest.mark.parametrize("method", ["comigs", "fedavg"])
def test_unequal_ranks_of_what_is_averaged_are_refused_with_a_clear_line(tmp_path, method):
    config = run_config(tmp_path, entries={"bob": {"rank": 4, "specialist_rank": 4}}, method=method)
    with pytest.raises(UserError, match=r"^clients\.bob: rank 4, but ada has 2"):
        load_method(config)


def test_fedavg_refuses_unequal_numbers_of_experts(tmp_path):
    config = run_config(tmp_path, entries={"bob": {"specialists": 3}}, method="fedavg")
    with pytest.raises(UserError, match=r"^clients\.bob: num_experts 4, but ada has 2"):
        load_method(config)


def test_an_unknown_method_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(UserError, match='unknown method "comig"') as raised:
        load_method(run_config(tmp_path, method="comig"))
    assert 'Did you mean "comigs"?' in str(raised.value) and all(
        name in str(raised.value) for name in list_methods()
    )


def test_someones_own_module_is_a_method_too(tmp_path, monkeypatch):
    module = ModuleType("their.method")
    module.method = lambda config: load_method(config.model_copy(update={"method": "fedavg"}))
    monkeypatch.setitem(sys.modules, "their", ModuleType("their"))
    monkeypatch.setitem(sys.modules, "their.method", module)
    assert load_method(run_config(tmp_path, method="their.method")).name == "fedavg"
    module.method = lambda config: 3
    with pytest.raises(UserError, match=r"method\(config\) returned int"):
        load_method(run_config(tmp_path, method="their.method"))
    del module.method
    with pytest.raises(UserError, match="expected a module with method"):
        load_method(run_config(tmp_path, method="their.method"))
    with pytest.raises(UserError, match=r"cannot be used: .*PYTHONPATH"):
        load_method(run_config(tmp_path, method="no.such.module"))


def test_a_method_that_weighs_a_download_need_not_measure_anything(tmp_path, monkeypatch):
    def mix(own, download, nats):
        return {slot: (own[slot] + new) / 2 for slot, new in download.items()}, 0.5

    module = ModuleType("their.method")
    module.method = lambda config: replace(
        load_method(config.model_copy(update={"method": "fedavg"})), mix=mix
    )
    monkeypatch.setitem(sys.modules, "their", ModuleType("their"))
    monkeypatch.setitem(sys.modules, "their.method", module)
    folder = api.run(run_config(tmp_path, method="their.method"), tmp_path / "run")
    shares = [line.adopted_share for line in folder.metrics() if isinstance(line, Evaluation)]
    assert 0.5 in shares


def test_every_method_says_its_name_what_it_does_and_its_paper(tmp_path):
    for name in list_methods():
        method = load_method(run_config(tmp_path, method=name))
        assert (
            method.name == name and method.summary and "\n" not in method.summary and method.paper
        )
