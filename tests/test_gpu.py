"""A GPU computes what the CPU does. Each test runs here with a pretended one in its place, too."""

from __future__ import annotations

import json
from contextlib import closing

import pytest
import torch
from torch.nn import functional as F

from comigs.app import api
from comigs.bases.load import fast_at_bfloat16, load_base
from comigs.bases.packed import forget
from comigs.client.loss import autocast
from comigs.config import BaseSection
from comigs.errors import Stopped
from comigs.methods.loading import list_methods
from comigs.personal.model import PersonalModel
from comigs.runs.metrics import RoundEnd
from tests.conftest import attach, random_tensors, run_config, shape_of, tiny
from tests.pretended_gpu import pretended_gpu

needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")


KINDS_OF_GPU = [
    pytest.param("pretended", marks=pytest.mark.slow),  # a minute, and it replaces parts of torch
    pytest.param("cuda", marks=[pytest.mark.gpu, needs_a_gpu]),
]


@pytest.fixture(params=KINDS_OF_GPU)
def device(request):
    """The device's name in a config."""
    if request.param == "cuda":
        yield "cuda"
        return
    with pretended_gpu():
        yield "cuda"


def on(device, name, dtype):
    return load_base(BaseSection(name=name, dtype=dtype, device=device))


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
@pytest.mark.parametrize(("dtype", "within"), [("float32", 1e-4), ("bfloat16", 0.15)])
def test_logits_and_gradients_are_those_of_float64_on_a_cpu(device, name, dtype, within):
    tokens = torch.arange(96).view(4, 24) % 251
    found = []
    for base, computes in ((tiny(name, "float64"), torch.float64), (on(device, name, dtype), None)):
        with attach(base.model, base.architecture, top_k=2) as attachment:
            tensors = random_tensors(attachment, shape_of(2, 2), routed=True)
            tensors = {
                slot: tensor.to(base.device, computes or torch.float32).requires_grad_()
                for slot, tensor in tensors.items()
            }
            attachment.bind(tensors)
            x = tokens.to(base.device)
            with autocast(base.dtype, base.device):
                logits = base.model(x, use_cache=False).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), x[:, 1:].flatten())
            gradients = torch.autograd.grad(loss, list(tensors.values()))
        whole = torch.cat([gradient.flatten() for gradient in gradients])
        found.append([part.detach().cpu().double() for part in (logits, whole)])
    for true, mine in zip(*found, strict=True):
        assert (mine - true).norm() <= within * true.norm()


@pytest.fixture
def runs(tmp_path, device):
    """The same small run on a CPU and on the device."""
    on_cpu = run_config(tmp_path, base={"name": "tiny-llama", "device": "cpu"})
    on_device = run_config(tmp_path, base={"name": "tiny-llama", "device": device})
    return api.run(on_cpu, tmp_path / "cpu"), api.run(on_device, tmp_path / "device")


def test_a_run_learns_what_it_learns_on_a_cpu(runs):
    on_cpu, on_device = (run.summary().clients for run in runs)
    for name, client in on_cpu.items():
        assert on_device[name].test.nats_per_token == pytest.approx(
            client.test.nats_per_token, rel=1e-3
        )
        assert client.test.nats_per_token != client.base_test.nats_per_token
    lines = (runs[1].path / "timings.jsonl").read_text(encoding="utf-8").splitlines()
    timings = [json.loads(line) for line in lines]
    assert any(line.get("peak_memory_bytes", 0) > 0 for line in timings)


def test_a_model_of_the_device_says_on_a_cpu_what_it_says_there(runs, device):
    texts = []
    for where in ("cpu", device):
        base = on(where, "tiny-llama", "float32")
        with closing(PersonalModel(runs[1], "ada", base)) as model:
            texts.append(model.generate("engine number", max_new_tokens=24, temperature=0))
    assert texts[0] == texts[1] != ""


def test_a_run_goes_on_where_it_was_left(tmp_path, device):
    config = run_config(tmp_path, base={"name": "tiny-llama", "device": device})
    whole = api.run(config, tmp_path / "whole")

    def stop(event):
        if isinstance(event, RoundEnd) and event.round == 1:
            raise KeyboardInterrupt

    with pytest.raises(Stopped):
        api.run(config, tmp_path / "part", report=stop)
    resumed = api.resume(tmp_path / "part")
    assert resumed.summary().as_json()["clients"] == whole.summary().as_json()["clients"]


APART = {"specialists": "apart", "attention": "mean"}
OPTIONS = {
    "paper": {"options": APART, "experts": {"generalists": 2, "specialists": 2}},
    "documents": {"options": APART, "privacy": {"level": "document", "noise_multiplier": 1.0}},
    "sums": {"options": APART, "privacy": {"secure_aggregation": True}},
    "signals": {"client": {"router_data": "entropy"}, "experts": {"routing": "sequence"}},
    "memory": {"base": {"recompute": True}, "client": {"micro_batch_size": 2}},
    "numbers": {"base": {"dtype": "bfloat16"}, "upload": {"format": "int8"}},
    "power": {"conditions": {"clients": {"ada": {"specialists": [[2, 2]]}}}, "rounds": 2},
}
KINDS = {**{name: {"method": name} for name in list_methods()}, **OPTIONS}
ONE_STEP = {"steps": 1, "router_every": 1, "router_steps": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_methods_and_options_compute_where_the_base_is(tmp_path, device, kind):
    tree = {"rounds": 1, "evaluation": {"every": 0, "keep": "last"}, **KINDS[kind]}
    tree["client"] = {**ONE_STEP, **tree.get("client", {})}
    tree["base"] = {"name": "tiny-llama", "device": device, **tree.get("base", {})}
    run = api.run(run_config(tmp_path, "ada bob cyd", **tree), tmp_path / "run")
    for client in run.summary().clients.values():
        assert client.test.nats_per_token != client.base_test.nats_per_token


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_a_chunk_at_a_time_is_the_same(device, name, monkeypatch):
    """As many tokens as one chunk has; and as a few chunks have, the last one smaller."""
    tokens, found = torch.arange(96).view(4, 24) % 251, []
    base = on(device, name, "float32")
    for numbers in (1 << 24, 3 * 64 * 17):
        monkeypatch.setattr("comigs.experts.hidden_torch.CHUNK_ELSEWHERE", numbers)
        with attach(base.model, base.architecture, top_k=2) as attachment:
            tensors = random_tensors(attachment, shape_of(1, 2, rank=3), routed=True)
            tensors = {slot: t.to(base.device).requires_grad_() for slot, t in tensors.items()}
            attachment.bind(tensors)
            logits = base.model(tokens.to(base.device), use_cache=False).logits
            gradients = torch.autograd.grad(logits.square().mean(), list(tensors.values()))
            found.append([t.detach().cpu() for t in (logits, *gradients)])
    for whole, parts in zip(*found, strict=True):
        assert torch.allclose(whole, parts, rtol=1e-4, atol=1e-6)


def test_bfloat16_is_chosen_where_a_gpu_computes_in_it(monkeypatch):
    for capability, fast in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert fast_at_bfloat16(torch.device("cuda", 1)) == fast


def test_a_pretended_gpu_is_as_strict_as_one():
    with pretended_gpu():
        there, here = torch.ones(2, 3, device="cuda"), torch.ones(3)
        assert str(there.device) == "cuda:0" and (there + 1).sum().item() == 12
        assert there[torch.tensor([1])].device == there.device
        with pytest.raises(RuntimeError, match="is on cpu, not cuda:0"):
            there[torch.tensor([1])] = torch.zeros(1, 3)
        with pytest.raises(RuntimeError, match="is on cpu, not cuda:0"):
            there @ here
        with pytest.raises(TypeError, match="numpy: the tensor is on cuda:0"):
            there.numpy()
        own = here.requires_grad_().to("cuda")
        (there @ own).sum().backward()
        assert own.device == there.device and torch.equal(here.grad, torch.full((3,), 2.0))
        # of a base that was loaded there, no memory is given back to the kernel
        forget(there)
