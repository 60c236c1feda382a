"""Packed linears: numbers are the gguf package's, products and gradients those of whole ones."""

from __future__ import annotations

import re
from contextlib import closing
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from comigs.app import api
from comigs.app.export import export
from comigs.bases import from_gguf
from comigs.bases.load import load_base
from comigs.bases.packed import TYPES, Buffer, PackedLinear, forget, num_parameters, unpack
from comigs.client.loss import Windows, sum_cross_entropy
from comigs.config import BaseSection
from comigs.errors import UserError
from comigs.personal.export.gguf_file import write_gguf
from tests.conftest import APART, attach, bits, random_tensors, run_config, shape_of
from tests.exports import base_of
from tests.runs import refused, write_config

KINDS = ["int8", "int4"]


def load(path, weights="whole", dtype="float32"):
    return load_base(BaseSection(name=str(path), weights=weights, dtype=dtype, device="cpu"))


def linear_of(weight, bias=None):
    linear = nn.Linear(1, 1, bias=False)
    linear.in_features, linear.out_features = weight.shape[1], weight.shape[0]
    linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), bias
    return linear


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("type", [Type.Q8_0, Type.Q4_0, Type.Q4_1], ids=str)
def test_numbers_of_a_gguf_stay_what_they_were(way, type):
    weight = gguf.dequantize(gguf.quantize(random(5, 96).numpy(), type), type)
    kind = "int8" if type == Type.Q8_0 else "int4"
    packed = PackedLinear(linear_of(torch.from_numpy(weight)), TYPES[kind], Buffer())
    assert packed.form == type
    assert np.array_equal(packed.weight.numpy(), weight)
    half = packed.unpacked(torch.bfloat16)
    assert torch.equal(half, torch.from_numpy(weight).bfloat16())


@pytest.mark.parametrize("kind", KINDS)
def test_other_numbers_are_near(way, kind):
    weight = random(64, 256)
    weight[0], weight[1] = 0, 3e-6 * weight[1]  # nothing, and scales that float16 hardly has
    packed = PackedLinear(linear_of(weight), TYPES[kind], Buffer())
    error = (packed.weight - weight)[2:].norm() / weight[2:].norm()
    assert error < {"int8": 0.007, "int4": 0.1}[kind]
    assert not packed.weight[0].any() and packed.weight.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_and_its_gradient_are_those_of_the_weight(way, kind, dtype):
    buffer, bias = Buffer(), nn.Parameter(random(48), requires_grad=False)
    packed = PackedLinear(linear_of(random(48, 64), bias), TYPES[kind], buffer)
    other = PackedLinear(linear_of(random(96, 32)), TYPES[kind], buffer)
    x, grad = random(2, 7, 64).to(dtype).requires_grad_(), random(2, 7, 48)
    y = packed(x)
    other(random(3, 32).to(dtype))  # another weight is in the buffer when the gradient comes
    (found,) = torch.autograd.grad(y, x, grad.to(dtype))
    weight = packed.weight.double()
    exact = x.detach().double() @ weight.T + bias.double()
    tolerance = 1e-6 if dtype == torch.float32 else 0.01
    for result, truth in ((y.detach(), exact), (found, grad.double() @ weight)):
        assert (result - truth).norm() <= tolerance * truth.norm()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_client_on_a_packed_base_has_the_gradients_of_the_whole_one(kind, family):
    """The whole one has the packed one's numbers."""
    packed, whole = load(base_of(family), kind), load(base_of(family), kind)
    unpack(whole.model)
    windows = Windows(*torch.randint(600, (2, 3, 20), generator=torch.Generator().manual_seed(0)))
    results = []
    for base in (packed, whole):
        before = {name: bits(tensor) for name, tensor in base.model.state_dict().items()}
        with attach(base.model, base.architecture) as attachment:
            tensors = random_tensors(attachment, shape_of(1, 1), routed=True)
            for tensor in tensors.values():
                tensor.requires_grad_()
            attachment.bind(tensors)
            nats = sum_cross_entropy(base.model, windows)
            nats.backward()
        results.append({"nats": nats.detach()} | {slot: t.grad for slot, t in tensors.items()})
        assert before == {name: bits(t) for name, t in base.model.state_dict().items()}
    for key, exact in results[1].items():
        assert (results[0][key] - exact).norm() <= 1e-6 * exact.norm(), key


def test_a_packed_base_is_smaller_has_its_own_fingerprint_and_as_many_numbers():
    bases = {kind: load(base_of("llama"), kind) for kind in ("whole", *KINDS)}
    assert len({base.fingerprint for base in bases.values()}) == 3
    assert len({num_parameters(base.model) for base in bases.values()}) == 1
    sizes = {}
    for kind, base in bases.items():
        blocks = base.model.model.layers
        sizes[kind] = sum(t.nbytes for t in [*blocks.parameters(), *blocks.buffers()])
    assert sizes["int8"] < 0.3 * sizes["whole"] and sizes["int4"] < 0.2 * sizes["whole"]


def test_a_quantised_gguf_is_packed_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv("COMIGS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(from_gguf, "unpack", from_gguf.unpack_here)
    base, file = load(base_of("llama")), tmp_path / "small.gguf"
    write_gguf(file, base.model, base.tokenizer, "q8_0", "small")
    whole, packed = load(file), load(file, "int8")
    linears = [path for path, m in packed.model.named_modules() if isinstance(m, PackedLinear)]
    assert linears
    for path in linears:
        weights = [b.model.get_submodule(path).weight.detach() for b in (packed, whole)]
        assert bits(weights[0]) == bits(weights[1])


def resident():
    """Bytes of files that are in this process's memory."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"^RssFile:\s+(\d+)", status, re.MULTILINE)[1])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells what is mapped")
def test_what_was_read_of_a_file_leaves_the_memory_and_can_be_read_again(tmp_path):
    numbers = random(1 << 22)
    save_file({"other": numbers[:8].clone(), "numbers": numbers}, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        mapped = file.get_tensor("numbers")
    assert torch.equal(mapped, numbers)
    before = resident()
    forget(mapped)
    forget(numbers)  # which is no file's
    assert before - resident() > 0.9 * numbers.nbytes
    assert torch.equal(mapped, numbers)


@pytest.mark.parametrize("format", ["transformers", "peft", "gguf"])
def test_a_run_on_a_packed_base_writes_and_is_exported_with_its_numbers(tmp_path, format):
    base = {"name": str(base_of("llama")), "weights": "int4"}
    config = run_config(tmp_path, "ada", base=base, client={"steps": 2}, options=APART)
    run = api.run(config, tmp_path / "run")
    with closing(api.open_personal_model(run.path, "ada")) as model:
        assert model.generate("paint", max_new_tokens=3)
    out = tmp_path / ("out.gguf" if format == "gguf" else "out")
    made = export(run.path, "ada", format, out, "float32")
    assert made.exact and made.difference < 1e-3


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tiny-gpt2", "mlp.c_fc of base tiny-gpt2 is a Conv1D of 16 inputs.*allowed: whole"),
        ("tiny-llama", "is a Linear of 16 inputs.*a Linear of a multiple of 32; allowed: whole"),
    ],
)
def test_a_base_that_cannot_be_packed_is_refused_in_one_line(name, said):
    with pytest.raises(UserError, match=said) as raised:
        load(name, "int4")
    assert "\n" not in str(raised.value)


def test_packed_numbers_are_refused_where_numbers_are_exact(tmp_path, capsys):
    said = refused(capsys, "run", write_config(tmp_path), "--set", "base.weights=int4", "--set",
                   "base.dtype=float64")  # fmt: skip
    assert "base.weights: given 'int4'; is not for base.dtype float64; allowed there: whole" in said
    assert not (tmp_path / "runs").exists()
