"""A GPU computes what the CPU does. Each test runs here with the CPU in the GPU's place, too."""

from __future__ import annotations

import json
from contextlib import closing

import pytest
import torch
from torch.nn import functional as F

from comigs.app import api
from comigs.bases.load import load_base
from comigs.client.loss import autocast
from comigs.config import BaseSection
from comigs.errors import Stopped
from comigs.personal.model import PersonalModel
from comigs.runs.metrics import RoundEnd
from tests.conftest import attach, random_tensors, run_config, shape_of, tiny

needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
pytestmark = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_a_gpu])]
)


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
