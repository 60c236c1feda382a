"""Every family of bases, by what it does: with experts on, trained, generated from, and taken off.

The naive mixture of every family is in test_mixture.py, its loss in test_loss.py, rows of several
clients on it in test_serve_rows.py.
"""

from __future__ import annotations

import json

import pytest
import torch
from transformers import CONFIG_MAPPING

from comigs.app import api
from comigs.bases.load import architecture_of, load_base
from comigs.bases.refused import REFUSED
from comigs.bases.tiny import byte_tokenizer
from comigs.config import BaseSection
from comigs.errors import UserError
from comigs.personal.serve.model import RowModel
from tests.conftest import attach, bits, copy_of, random_tensors, run_config, shape_of
from tests.families import CONFIGS, built, saved

INPUT = torch.randint(97, (2, 10), generator=torch.Generator().manual_seed(0))
CAPPED = "gemma2"  # whose attention has a cap on its scores


@pytest.mark.parametrize("model_type", CONFIGS)
def test_one_expert_that_changes_nothing_is_the_base_and_detaching_leaves_it_identical(model_type):
    model = built(model_type)
    modules, state = list(model.named_modules()), copy_of(model.state_dict())
    logits = model(INPUT).logits
    with attach(model, architecture_of(model)) as attachment:
        tensors = random_tensors(attachment, shape_of(1, 0), routed=True)
        zeros = {
            slot: t.zero_() if slot.matrix == "B" else t for slot, t in copy_of(tensors).items()
        }
        attachment.bind(zeros)
        torch.testing.assert_close(model(INPUT).logits, logits, rtol=0, atol=1e-5)
        attachment.bind(tensors)
        assert (model(INPUT).logits - logits).abs().max() > 1e-3
    assert all(a is b for (_, a), (_, b) in zip(model.named_modules(), modules, strict=True))
    assert bits(model(INPUT).logits) == bits(logits)
    assert all(bits(model.state_dict()[name]) == bits(t) for name, t in state.items())


@pytest.mark.parametrize("model_type", CONFIGS)
def test_generating_with_a_cache_equals_generating_without(model_type):
    """20 tokens more, which is past a window of 8."""
    model = built(model_type)
    wanted = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 2, "eos_token_id": None}
    with attach(model, architecture_of(model)) as attachment:
        attachment.bind(random_tensors(attachment, shape_of(1, 2), routed=True))
        cached, plain = (model.generate(INPUT, use_cache=use, **wanted) for use in (True, False))
        by_hand = INPUT
        for _ in range(20):
            best = model(by_hand, use_cache=False).logits[:, -1].argmax(dim=-1)
            by_hand = torch.cat([by_hand, best[:, None]], dim=1)
    assert torch.equal(cached, plain) and torch.equal(cached, by_hand)
    assert cached.shape == (2, 30)


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.few(5)
def test_a_run_on_a_folder_of_the_family_learns(model_type, tmp_path):
    """Prepared, trained and evaluated by the run itself, from what `save_pretrained` wrote."""
    config = run_config(
        tmp_path,
        "ada",
        base={"name": str(saved(model_type, tmp_path / "base"))},
        client={"steps": 6, "lr": 2e-2},
        rounds=1,
    )
    run = api.run(config, tmp_path / "run")
    scores = run.summary().clients["ada"]
    assert scores.test.nats_per_token < scores.base_test.nats_per_token


def test_a_cap_on_attention_is_kept_or_the_base_is_refused(tmp_path):
    folder = saved(CAPPED, tmp_path / "base")
    base = load_base(BaseSection(name=str(folder), dtype="float32", device="cpu"))
    assert base.model.config._attn_implementation == "eager"
    with pytest.raises(UserError, match=r'^base.attention: given "sdpa".*allowed: auto, eager$'):
        load_base(BaseSection(name=str(folder), attention="sdpa", device="cpu"))
    with pytest.raises(UserError, match=r"a cap on its attention.*comigs generate"):
        RowModel(base)


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_experts_cannot_be_put_on_is_refused_by_name_with_the_reason(model_type, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError) as raised:
        load_base(BaseSection(name=str(tmp_path)))
    assert str(raised.value) == f'base: the model family "{model_type}" {REFUSED[model_type]}'


def test_every_family_that_is_named_is_one_of_transformers():
    assert REFUSED.keys() | CONFIGS.keys() <= set(CONFIG_MAPPING)
    assert not CONFIGS.keys() & REFUSED.keys()
