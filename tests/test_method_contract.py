"""What every file of methods/ must hold to, whatever it does (methods/method.py, docstring)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from comigs import api
from comigs.client.client import PRIVATE
from comigs.engines.rounds import pack_server, unpack_server
from comigs.errors import Stopped, UserError
from comigs.methods.method import list_methods, load_method
from tests.conftest import copy_of, run_config, same, start_engine

NAMES = ("ada", "bob", "cyd")
QUIET = lambda level, nats: None  # noqa: E731

pytestmark = pytest.mark.parametrize("name", list_methods())


class Setting:
    """Three clients of a method, and uploads as they would send them, with random values."""

    def __init__(self, root, name, dtype=torch.float32, **tree):
        self.engine = start_engine(run_config(root, " ".join(NAMES), method=name, **tree))
        self.clients = self.engine.clients
        self.method = self.clients["ada"].method
        self.dtype = dtype
        self.templates = {client: c.send() for client, c in self.clients.items()}
        self.shares_something = any(self.templates.values())

    def uploads(self, seed=0):
        random = torch.Generator().manual_seed(seed)
        return {
            client: {slot: torch.randn(t.shape, generator=random).to(self.dtype) for slot, t in template.items()}
            for client, template in self.templates.items()
        }

    def memory(self):
        """The server's carry-over after a first round."""
        return self.method.aggregate(self.uploads(99), {})[1]


def equal(a, b):
    return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)


def products(tensors):
    """B @ A of every pair, and single tensors as they are: what the update does, however it is factored."""
    result = {}
    for slot, tensor in tensors.items():
        key = (slot.layer, slot.site, slot.part)
        partner = {s.matrix: t for s, t in tensors.items() if (s.layer, s.site, s.part) == key}
        result[key] = partner["B"] @ partner["A"] if partner.keys() == {"A", "B"} else tensor
    return result


@pytest.fixture
def setting(name, tmp_path):
    return Setting(tmp_path, name)


def test_an_upload_holds_what_the_method_shares_and_nothing_private(setting):
    for client in setting.clients.values():
        client.train(1, QUIET)
        upload = client.send()
        assert set(upload) == {slot for slot in client.trainee.tensors if setting.method.shares(slot)}
        assert not [slot for slot in upload if slot.role in PRIVATE]


def test_a_download_touches_what_the_method_receives_and_nothing_private(setting):
    downloads, _ = setting.method.aggregate(setting.uploads(), {})
    assert list(downloads) == list(NAMES)  # one for each client
    for name, client in setting.clients.items():
        before = copy_of(client.trainee.tensors)
        for slot, tensor in downloads[name].items():
            assert setting.method.receives(slot) and slot.role not in PRIVATE
            assert tensor.shape == before[slot].shape
        client.receive(downloads[name])
        untouched = before.keys() - downloads[name].keys()
        assert same({s: before[s] for s in untouched}, {s: client.trainee.tensors[s] for s in untouched})
        assert same(dict(downloads[name]), {s: client.trainee.tensors[s] for s in downloads[name]})


def test_identical_uploads_come_back_unchanged(setting):
    upload = setting.uploads()["ada"]
    downloads, _ = setting.method.aggregate(dict.fromkeys(NAMES, upload), {})
    for download in downloads.values():
        if not same({s: upload[s] for s in download if s in upload}, dict(download)):
            expected = products(upload)  # factored anew, but the same update
            for key, product in products(download).items():
                torch.testing.assert_close(product, expected[key], rtol=0, atol=1e-5)


def test_the_order_of_clients_does_not_matter(setting):
    uploads, memory = setting.uploads(), setting.memory()
    downloads, _ = setting.method.aggregate(uploads, memory)
    reordered, _ = setting.method.aggregate(dict(reversed(uploads.items())), memory)
    assert equal(downloads, reordered)


def test_clients_that_swap_uploads_swap_downloads(setting):
    uploads = setting.uploads()
    swap = {"ada": "bob", "bob": "cyd", "cyd": "ada"}
    downloads, _ = setting.method.aggregate(uploads, {})
    swapped, _ = setting.method.aggregate({name: uploads[swap[name]] for name in NAMES}, {})
    assert equal(swapped, {name: downloads[swap[name]] for name in NAMES})


def test_every_clients_upload_counts(setting):
    if not setting.shares_something:
        return
    uploads = setting.uploads()
    downloads, _ = setting.method.aggregate(uploads, {})
    for name in NAMES:
        for matrix in {slot.matrix for slot in uploads[name]}:
            changed = {s: t + 1 if s.matrix == matrix else t for s, t in uploads[name].items()}
            others, _ = setting.method.aggregate({**uploads, name: changed}, {})
            assert not equal(downloads, others), f"{name}'s {matrix} changes nothing"


def test_aggregate_is_pure(setting):
    uploads, memory = setting.uploads(), setting.memory()
    before, memory_before = {name: copy_of(u) for name, u in uploads.items()}, copy_of(memory)
    first, first_memory = setting.method.aggregate(uploads, memory)
    second, second_memory = setting.method.aggregate(uploads, memory)
    assert equal(first, second) and same(dict(first_memory), dict(second_memory))
    assert equal(uploads, before) and same(dict(memory), memory_before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtype_and_device_are_kept(name, tmp_path, dtype):
    setting = Setting(tmp_path, name, dtype)
    downloads, _ = setting.method.aggregate(setting.uploads(), {})
    assert all(t.dtype == dtype and t.device.type == "cpu" for d in downloads.values() for t in d.values())


def test_memory_and_downloads_survive_being_saved_and_loaded(setting):
    first = setting.method.aggregate(setting.uploads(1), {})
    raw = safetensors.torch.save(pack_server(*first))
    downloads, memory = unpack_server(safetensors.torch.load(raw))
    assert equal(downloads, {name: dict(d) for name, d in first[0].items()})
    assert same(dict(memory), dict(first[1]))
    went_on, resumed = (setting.method.aggregate(setting.uploads(2), m) for m in (first[1], memory))
    assert equal(went_on[0], resumed[0]) and same(dict(went_on[1]), dict(resumed[1]))


def test_one_client_alone_trains_as_if_there_were_no_server(name, tmp_path):
    """Bit for bit, after two rounds through the whole round loop."""
    config = run_config(tmp_path, "ada", method=name)
    out = tmp_path / "run"
    api.run(config, out)
    alone = start_engine(config).clients["ada"]
    for round in (1, 2):
        alone.train(round, QUIET)
    personal = safetensors.torch.load_file(out / "clients" / "ada" / "personal.safetensors")
    assert same(personal, alone.state()["experts"])


@pytest.mark.parametrize(
    "entry", [{"rank": 3}, {"specialist_rank": 3}, {"specialists": 2}, {"specialists": 2, "rank": 3}]
)
def test_unequal_clients_work_or_are_refused_before_anything_runs(name, tmp_path, entry):
    config = run_config(tmp_path, " ".join(NAMES), {"bob": entry}, method=name)
    try:
        load_method(config)
    except UserError as error:
        assert str(error).startswith("clients.") and "\n" not in str(error)
        return
    setting = Setting(tmp_path, name, entries={"bob": entry})
    uploads = setting.uploads()
    downloads, memory = setting.method.aggregate(uploads, {})
    for client, download in downloads.items():
        assert all(t.shape == setting.clients[client].trainee.tensors[slot].shape for slot, t in download.items())
        setting.clients[client].receive(download)
    safetensors.torch.save(pack_server(downloads, memory))


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(name, tmp_path):
    config = run_config(tmp_path, " ".join(NAMES), {"bob": {"specialist_rank": 3}}, method=name, rounds=3)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"

    def stop(event):
        if event["kind"] == "step" and event["round"] == 2 and event["client"] == "bob":
            raise KeyboardInterrupt

    api.run(config, whole)
    with pytest.raises(Stopped):
        api.run(config, stopped, report=stop)
    api.resume(stopped)
    for path in ("metrics.jsonl", "summary.json", *(f"clients/{n}/personal.safetensors" for n in NAMES)):
        tensors = path.endswith("safetensors")
        read = safetensors.torch.load_file if tensors else Path.read_bytes
        one, other = read(whole / path), read(stopped / path)
        assert same(one, other) if tensors else one == other, path
    shutil.rmtree(stopped)
