"""A processor that is slow at bfloat16, as most without AVX-512 are, computes in float32: a device
that joins a run in bfloat16 does so with the same weights, and whoever asks for it is told.
"""

from __future__ import annotations

import pytest
import torch

from comigs.app import api
from comigs.bases import load
from comigs.bases.load import as_fast
from tests.conftest import bits, run_config, tiny
from tests.local_grid import Federation

SLOW = "this processor is slow at bfloat16"


@pytest.fixture(params=[True, False], ids=["slow", "fast"])
def slow(request, monkeypatch):
    monkeypatch.setattr(load, "fast_at_bfloat16", lambda device: not request.param)
    monkeypatch.setattr("comigs.app.setup.fast_at_bfloat16", lambda device: not request.param)
    return request.param


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_the_weights_stay_and_are_computed_with_in_float32(name, slow):
    before, base = tiny(name, "bfloat16"), as_fast(tiny(name, "bfloat16"))
    assert base.dtype == (torch.float32 if slow else torch.bfloat16)
    assert base.fingerprint == before.fingerprint
    held = dict(base.model.named_parameters())
    for path, weight in before.model.named_parameters():
        assert held[path].dtype == base.dtype
        assert bits(held[path].to(torch.bfloat16)) == bits(weight)
    ids = torch.arange(40)[None]
    exact = tiny(name, "bfloat16").model.double()(ids).logits
    error = (base.model(ids).logits - exact).abs().max()
    assert error < (1e-5 if slow else 1e-1)


def test_other_types_stay_as_they_are(slow):
    for dtype in ("float32", "float64"):
        base = tiny("tiny-gpt2", dtype)
        assert as_fast(base) is base


def test_auto_is_the_fast_one(slow):
    assert tiny("tiny-gpt2", "auto").dtype == (torch.float32 if slow else torch.bfloat16)


@pytest.mark.few(1)
def test_a_slow_device_takes_part_in_a_run_in_bfloat16(slow, tmp_path):
    config = run_config(tmp_path / "text", base={"dtype": "bfloat16"})
    alone, said = api.run(config, tmp_path / "alone"), []
    federation = Federation(tmp_path / "federation", ["ada", "bob"], tmp_path / "text")
    federation.run(tmp_path / "run", config)
    for name, lines in federation.said.items():
        assert any(SLOW in line for line in lines) == slow
        device = federation.device_run(name)
        assert 'dtype = "bfloat16"' in (device / "config.toml").read_text()
        said.append(api.evaluate(device)[name]["personal"]["perplexity"])
    # It learns what it would have learnt in bfloat16, but for rounding.
    expected = [client.test.perplexity for client in alone.summary().clients.values()]
    assert said == pytest.approx(expected, rel=2e-2)


def test_whoever_asks_for_it_is_told(slow, tmp_path):
    for dtype in ("bfloat16", "float32"):
        config, lines = run_config(tmp_path, base={"dtype": dtype}), []
        api.run(config, tmp_path / dtype, say=lines.append)
        assert any(SLOW in line for line in lines) == (slow and dtype == "bfloat16")
