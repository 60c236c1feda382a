"""What every file of methods/ must hold to, whatever it does (methods/method.py, docstring).

A method of one's own is held to it with COMIGS_METHOD=package.module.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from comigs.app import api
from comigs.bases.load import load_base
from comigs.client.client import PRIVATE
from comigs.config import parse_config
from comigs.errors import Stopped, UserError
from comigs.experts.attach import Attachment
from comigs.methods.loading import list_methods, load_method
from comigs.methods.method import RoundContext
from comigs.server.pending import next_downloads, pack_server, unpack_server
from comigs.server.validation import check_upload, expected_upload, shapes_of_clients
from comigs.slots import Slot
from tests.conftest import copy_of, run_config, same, start_engine

NAMES = ("ada", "bob", "cyd")
NO_PULL = {
    "fedprox": {"mu": 0},
    "hetlora": {"penalty": 0, "gamma": 1},
}  # what is not training as if alone
QUIET = lambda level, nats: None  # noqa: E731

METHODS = os.environ.get("COMIGS_METHOD", "").split() or list_methods()

WAYS = ["C", pytest.param("PyTorch", marks=pytest.mark.slow)]
pytestmark = [
    pytest.mark.parametrize("name", METHODS),
    pytest.mark.parametrize("way", WAYS, indirect=True),
    pytest.mark.usefixtures("way"),
]


class Setting:
    """Three clients of a method, and uploads as they would send them, with random values."""

    def __init__(self, root, name, dtype=torch.float32, **tree):
        self.config = run_config(root, " ".join(NAMES), method=name, **tree)
        self.engine = start_engine(self.config)
        self.clients = self.engine.clients
        self.method = self.clients["ada"].method
        self.dtype = dtype
        self.templates = {
            name: self.clients[name].send(1)
            for name in self.clients
            if name in self.engine.trainers
        }
        self.shares_something = any(self.templates.values())

    def uploads(self, seed=0):
        random = torch.Generator().manual_seed(seed)
        return {
            client: {
                slot: torch.randn(t.shape, generator=random).to(self.dtype)
                for slot, t in template.items()
            }
            for client, template in self.templates.items()
        }

    def aggregate(self, uploads, memory=None, peer_nats=None):
        """As the round loop calls it. peer_nats: reader -> author -> nats; as good as equal where
        not given.
        """
        nats = {
            r: {a: 1.0 + 0.1 * i + 0.03 * j for j, a in enumerate(NAMES)}
            for i, r in enumerate(NAMES)
        }
        context = RoundContext(
            NAMES,
            dict.fromkeys(uploads, 100),
            (peer_nats or nats) if self.method.reads_peers else {},
        )
        return self.method.aggregate(uploads, memory or {}, context)

    def memory(self):
        """The server's carry-over after a first round."""
        return self.aggregate(self.uploads(99))[1]


def equal(a, b):
    return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)


def products(tensors, config):
    """What an update does to each linear, however it is factored: (layer, site, part) -> scaled sum
    of B @ A.

    What is merged counts, with the LoRA on the same linear, as one. A factor that travels alone is
    taken as it is.
    """
    result = {}
    for slot, tensor in tensors.items():
        partner = tensors.get(Slot(slot.layer, slot.site, slot.part, "B"))
        merges = slot.role in ("merged", "update") or any(
            s.role in ("merged", "update") for s in tensors
        )
        part = "all" if merges else slot.part
        key = (slot.layer, slot.site, part)
        if slot.matrix == "A" and partner is not None:
            scale = 1.0 if slot.role == "update" else 16 / len(tensor) ** 0.5
            result[key] = result.get(key, 0) + scale * partner.double() @ tensor.double()
        elif slot.role == "merged":
            result[key] = result.get(key, 0) + tensor.double()
        elif slot.matrix == "W" or partner is None:
            result[(*key, slot.matrix)] = result.get((*key, slot.matrix), 0) + tensor.double()
    return result


def agree(a, b, config, tolerance=1e-5):
    """Equal to the bit, or factored anew: the same update, to rounding."""
    if a.keys() == b.keys() and same(dict(a), dict(b)):
        return True
    one, other = products(a, config), products(b, config)
    return one.keys() == other.keys() and all(
        torch.allclose(one[key], other[key], rtol=0, atol=tolerance * float(one[key].abs().max()))
        for key in one
    )


def all_agree(a, b, config):
    return a.keys() == b.keys() and all(agree(a[name], b[name], config) for name in a)


@pytest.fixture
def setting(name, tmp_path):
    return Setting(tmp_path, name)


def test_an_upload_holds_what_the_method_shares_and_nothing_private(setting):
    for client in setting.clients.values():
        client.train(1, QUIET)
        upload = client.send(1)
        shared = {slot for slot in client.train_state.tensors if setting.method.shares(slot)}
        assert set(upload) == {slot for slot in shared if setting.method.trains(slot, 1)}
        assert not [slot for slot in upload if slot.role in PRIVATE]


@pytest.mark.parametrize("round", [1, 2])
def test_an_upload_is_what_the_server_expects(setting, round):
    """Slots and shapes, known from the config and the base's linears alone."""
    shapes = setting.engine.engine.shapes
    for name in setting.engine.trainers:
        upload = setting.clients[name].send(round)
        assert check_upload(upload, expected_upload(setting.method, shapes[name], round)) is None
        for slot in list(upload)[:1]:
            del upload[slot]
            assert (
                check_upload(upload, expected_upload(setting.method, shapes[name], round))
                == f"missing: {slot}"
            )


def test_clients_that_sent_nothing_cost_the_server_a_number_each(name):
    """They share one download, so that a thousand idle clients are no more than one."""
    entries = [{"name": f"c{n}", "text": "x", "weight": n + 1} for n in range(40)]
    config = parse_config({"clients": entries, "method": name, "base": {"name": "tiny-gpt2"}})
    method, base = load_method(config), load_base(config.base)
    with Attachment(base.model, base.architecture, config.experts) as attachment:
        shapes = shapes_of_clients(config, method, attachment)
    assert len({id(s) for s in shapes.values()}) == 1
    senders, names = ("c0", "c7", "c30"), tuple(shapes)
    random = torch.Generator().manual_seed(0)
    uploads = {
        n: {
            s: torch.randn(d, generator=random)
            for s, d in expected_upload(method, shapes[n], 1).items()
        }
        for n in (senders[:1] if method.centralized else senders)
    }
    nats = {r: dict.fromkeys(uploads, 1.0) for r in uploads if method.reads_peers}
    downloads, memory = method.aggregate(
        uploads, {}, RoundContext(names, dict.fromkeys(uploads, 1.0), nats)
    )
    waiting = next_downloads(downloads, downloads, delivered=senders)
    assert len({id(waiting[n]) for n in waiting if n not in senders}) <= 1
    packed = pack_server(waiting, memory)
    few = pack_server({n: waiting[n] for n in (*senders, "c1") if n in waiting}, memory)
    assert packed.keys() == few.keys()


def test_a_download_touches_what_the_method_receives_and_nothing_private(setting):
    downloads, _ = setting.aggregate(setting.uploads())
    assert list(downloads) == list(NAMES)  # one for each client
    for name, client in setting.clients.items():
        before = copy_of(client.train_state.tensors)
        for slot, tensor in downloads[name].items():
            assert setting.method.receives(slot) and slot.role not in PRIVATE
            assert slot.role == "update" or tensor.shape == before[slot].shape
        client.receive(downloads[name])
        written = {slot: t for slot, t in downloads[name].items() if slot.role != "update"}
        changed = {
            slot
            for slot, t in client.train_state.tensors.items()
            if not torch.equal(t, before[slot])
        }
        if setting.method.reinitializes:  # what was merged, and the LoRA that went into it
            assert all(slot.role == "merged" or setting.method.shares(slot) for slot in changed)
        else:
            kept = {
                slot for slot in changed if slot.role in ("merged", "rest") or slot.is_gate
            }  # what is made of it
            assert changed - kept <= written.keys()
        if setting.method.mix is None:
            assert same(written, {s: client.train_state.tensors[s] for s in written})


def test_identical_uploads_come_back_unchanged(setting):
    """Whatever was sent is what comes back, under the slot it is received in (fedalt receives
    beside its own).
    """
    upload = next(iter(setting.uploads().values()), {})
    downloads, _ = setting.aggregate(dict.fromkeys(setting.templates, upload))
    for download in downloads.values():
        other, expected = dict(download), upload
        if setting.method.name == "fedalt":
            other = {
                Slot(s.layer, s.site, "g0" if s.part == "rest" else s.part, s.matrix): t
                for s, t in other.items()
            }
        if setting.method.reinitializes:
            expected = {Slot(s.layer, s.site, "update", s.matrix): t for s, t in upload.items()}
            scale = {s: 16 / len(t) ** 0.5 for s, t in expected.items() if s.matrix == "A"}
            expected = {s: t * scale.get(s, 1) for s, t in expected.items()}
        assert agree(expected, other, setting.config) or fedex_is_exact(expected, other)


def fedex_is_exact(upload, download):
    """The residual of equal uploads is zero, and the factors are unchanged."""
    residual = {s: t for s, t in download.items() if s.role == "update"}
    kept = {s: t for s, t in download.items() if s.role != "update"}
    return same(dict(upload), kept) and all(
        p.abs().max() < 1e-5 for p in products(residual, None).values()
    )


def test_the_order_of_clients_does_not_matter(setting):
    uploads, memory = setting.uploads(), setting.memory()
    downloads, _ = setting.aggregate(uploads, memory)
    reordered, _ = setting.aggregate(dict(reversed(uploads.items())), memory)
    assert all_agree(downloads, reordered, setting.config)


def test_clients_that_swap_uploads_swap_downloads(setting):
    if setting.method.centralized:
        pytest.skip("one model for all: nobody uploads but one")
    uploads = setting.uploads()
    swap = {"ada": "bob", "bob": "cyd", "cyd": "ada"}
    nats = {
        r: {a: 1.0 + 0.07 * i + 0.2 * j * (i + 1) for j, a in enumerate(NAMES)}
        for i, r in enumerate(NAMES)
    }
    swapped_nats = {r: {a: nats[swap[r]][swap[a]] for a in NAMES} for r in NAMES}
    downloads, _ = setting.aggregate(uploads, peer_nats=nats)
    swapped, _ = setting.aggregate(
        {name: uploads[swap[name]] for name in NAMES}, peer_nats=swapped_nats
    )
    assert all_agree(swapped, {name: downloads[swap[name]] for name in NAMES}, setting.config)


def test_every_clients_upload_counts(setting):
    if not setting.shares_something:
        return
    uploads = setting.uploads()
    downloads, _ = setting.aggregate(uploads)
    for name in uploads:
        for matrix in {slot.matrix for slot in uploads[name]}:
            changed = {s: t + 1 if s.matrix == matrix else t for s, t in uploads[name].items()}
            others, _ = setting.aggregate({**uploads, name: changed})
            assert not equal(downloads, others), f"{name}'s {matrix} changes nothing"


def test_any_client_may_be_missing_from_a_round(setting):
    """Those who sent something decide; whoever gets a download can use it; nobody at all is no
    error either.
    """
    for missing in NAMES:
        uploads = {name: upload for name, upload in setting.uploads().items() if name != missing}
        downloads, memory = setting.aggregate(uploads, setting.memory())
        assert set(downloads) <= set(NAMES)
        for name, download in downloads.items():
            setting.clients[name].receive(download)
        setting.aggregate(setting.uploads(3), memory)


def test_aggregate_is_pure(setting):
    uploads, memory = setting.uploads(), setting.memory()
    before, memory_before = {name: copy_of(u) for name, u in uploads.items()}, copy_of(memory)
    first, first_memory = setting.aggregate(uploads, memory)
    second, second_memory = setting.aggregate(uploads, memory)
    assert equal(first, second) and same(dict(first_memory), dict(second_memory))
    assert equal(uploads, before) and same(dict(memory), memory_before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtype_and_device_are_kept(name, tmp_path, dtype):
    setting = Setting(tmp_path, name, dtype)
    downloads, _ = setting.aggregate(setting.uploads())
    assert all(
        t.dtype == dtype and t.device.type == "cpu" for d in downloads.values() for t in d.values()
    )


def test_memory_and_downloads_survive_being_saved_and_loaded(setting):
    first = setting.aggregate(setting.uploads(1))
    raw = safetensors.torch.save(pack_server(*first))
    downloads, memory = unpack_server(safetensors.torch.load(raw))
    assert equal(downloads, {name: dict(d) for name, d in first[0].items()})
    assert same(dict(memory), dict(first[1]))
    went_on, resumed = (setting.aggregate(setting.uploads(2), m) for m in (first[1], memory))
    assert equal(went_on[0], resumed[0]) and same(dict(went_on[1]), dict(resumed[1]))


def test_one_client_alone_trains_as_if_there_were_no_server(name, tmp_path):
    """After two rounds through the whole round loop: bit for bit, or, where the server factors
    anew, after one.
    """
    refactors = name in ("flexlora", "flora", "fedex-lora")
    config = run_config(
        tmp_path,
        "ada",
        method=name,
        evaluation={"keep": "last"},
        options=NO_PULL.get(name, {}),
        rounds=1 if refactors else 2,
    )
    out = tmp_path / "run"
    api.run(config, out)
    alone = start_engine(config).clients["ada"]
    for round in range(1, config.rounds + 1):
        alone.train(round, QUIET)
    alone.finish()
    personal = safetensors.torch.load_file(out / "clients" / "ada" / "personal.safetensors")
    given = {
        slot: t for name, t in personal.items() if (slot := Slot.parse(name)).role != "rest"
    }  # of no weight
    expected = {slot: t for slot, t in alone.train_state.tensors.items() if slot.role != "rest"}
    assert agree(given, expected, config) if refactors else same(given, expected)


@pytest.mark.parametrize(
    "entry",
    [{"rank": 3}, {"specialist_rank": 3}, {"specialists": 2}, {"specialists": 2, "rank": 3}],
)
def test_unequal_clients_work_or_are_refused_before_anything_runs(name, tmp_path, entry):
    config = run_config(tmp_path, " ".join(NAMES), {"bob": entry}, method=name)
    try:
        load_method(config)
    except UserError as error:
        assert str(error).startswith("clients.") and "\n" not in str(error)
        return
    setting = Setting(tmp_path, name, entries={"bob": entry})
    downloads, memory = setting.aggregate(setting.uploads())
    for client, download in downloads.items():
        own = setting.clients[client].train_state.tensors
        assert all(
            slot.role == "update" or t.shape == own[slot].shape for slot, t in download.items()
        )
        setting.clients[client].receive(download)
    safetensors.torch.save(pack_server(downloads, memory))


@pytest.mark.few(3)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(name, tmp_path):
    entry = {"specialist_rank": 3}
    try:
        config = run_config(tmp_path, " ".join(NAMES), {"bob": entry}, method=name, rounds=3)
        load_method(config)
    except UserError:
        config = run_config(tmp_path, " ".join(NAMES), method=name, rounds=3)
    whole, stopped, centralized = (
        tmp_path / "whole",
        tmp_path / "stopped",
        load_method(config).centralized,
    )

    def stop(event):
        if (
            event.kind == "step"
            and event.round == 2
            and event.client == ("ada" if centralized else "bob")
        ):
            raise KeyboardInterrupt

    api.run(config, whole)
    with pytest.raises(Stopped):
        api.run(config, stopped, report=stop)
    api.resume(stopped)
    for path in (
        "metrics.jsonl",
        "summary.json",
        *(f"clients/{n}/personal.safetensors" for n in NAMES),
    ):
        tensors = path.endswith("safetensors")
        read = safetensors.torch.load_file if tensors else Path.read_bytes
        one, other = read(whole / path), read(stopped / path)
        assert same(one, other) if tensors else one == other, path
    shutil.rmtree(stopped)
