"""Exports in llama.cpp itself: logits, perplexity, tokens and greedy text against ours."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from comigs.app import api
from comigs.personal.export.gguf_text import rule_of
from tests.exports import exported, small_tokenizer, trained, valid_windows
from tests.llama_cpp import llama_cpp

IDS = np.random.default_rng(0).integers(1, 590, 60).tolist()
TEXTS = [
    "The cat  12 sat on 2024    7 mats.", "Größe, façade, 日本語\n\n\t x  \r\n",
    "<|endoftext|> is text", "it's we'll   99bottles", " leading and trailing ", "a" * 40, "",
]  # fmt: skip
MERGED = [
    ("1g1s", "llama"), ("four", "llama"), ("top1", "llama"), ("client", "llama"),
    ("fdlora", "llama"), ("1g1s", "llama-scaled"), ("client", "llama-biased"), ("1g1s", "qwen2"),
    ("top1", "qwen2"), ("fedavg", "qwen2"), ("1g1s", "qwen3"), ("fedavg", "qwen3"),
]  # fmt: skip
SHARED = [
    ("1g1s", "llama"), ("four", "llama"), ("top1", "llama"), ("fedavg", "llama"),
    ("fdlora", "llama"), ("1g1s", "qwen2"), ("1g1s", "qwen3"),
]  # fmt: skip


def logits_of(run, ids=IDS, client="ann"):
    """Our own."""
    model = api.open_personal_model(run, client)
    try:
        with torch.no_grad():
            return model.model(torch.tensor([ids])).logits[0]
    finally:
        model.close()


def file_of(folder):
    (path,) = folder.glob("*.gguf")
    return path


def perplexity(model, windows):
    """Of a model in llama.cpp, a window at a time."""
    nats, tokens = 0.0, 0
    for inputs, targets in windows:
        found = F.cross_entropy(model.logits(inputs), torch.tensor(targets), reduction="sum")
        nats, tokens = nats + float(found), tokens + len(targets)
    return math.exp(nats / tokens)


@pytest.mark.parametrize(("setting", "family"), MERGED)
def test_a_merged_model_has_our_logits(setting, family, tmp_path):
    run = trained(setting, family)
    exported(run, "gguf", tmp_path / "out", type="float32")
    with llama_cpp(file_of(tmp_path / "out")) as model:
        assert (model.logits(IDS) - logits_of(run)).abs().max() < 1e-3


@pytest.mark.parametrize(("setting", "family"), SHARED)
def test_a_shared_base_with_an_adapter_has_our_logits(setting, family, tmp_path):
    run = trained(setting, family)
    exported(run, "gguf-base", tmp_path / "base.gguf", type="float32")
    exported(run, "gguf-adapter", tmp_path / "ann.gguf", type="float32")
    with llama_cpp(tmp_path / "base.gguf", tmp_path / "ann.gguf") as model:
        assert (model.logits(IDS) - logits_of(run)).abs().max() < 1e-3
    with llama_cpp(tmp_path / "base.gguf") as model:  # and without it, it is not ours
        assert (model.logits(IDS) - logits_of(run)).abs().max() > 0.5


def test_one_base_is_every_clients(tmp_path):
    """The other client's adapter on the base that was exported for this one."""
    from comigs.app.export import export

    run = trained("1g1s")
    exported(run, "gguf-base", tmp_path / "base.gguf", type="float32")
    export(run, "bob", "gguf-adapter", tmp_path / "bob.gguf", type="float32")
    with llama_cpp(tmp_path / "base.gguf", tmp_path / "bob.gguf") as model:
        assert (model.logits(IDS) - logits_of(run, client="bob")).abs().max() < 1e-3


@pytest.mark.parametrize("setting", ["1g1s", "four", "top1", "others"])
@pytest.mark.parametrize(("type", "rel"), [("float16", 1e-4), ("bfloat16", 1e-3), ("q8_0", 4e-3)])
def test_a_stored_type_has_the_perplexity_that_was_said(setting, type, rel, tmp_path):
    run = trained(setting)
    done = exported(run, "gguf", tmp_path / "out", type=type)
    with llama_cpp(file_of(tmp_path / "out")) as model:
        found = perplexity(model, valid_windows(run))
    assert found == pytest.approx(done.export, rel=rel)
    if type == "float16" and done.exact:
        assert found == pytest.approx(done.personal, rel=1e-4)  # within 0.01 % of the run's own


@pytest.mark.parametrize("type", ["q8_0", "q4_1", "q4_0", "q5_1", "q5_0", "bfloat16"])
def test_a_shared_base_of_any_type_keeps_the_person(type, tmp_path):
    run = trained("1g1s")
    done = exported(run, "gguf-base", tmp_path / "base.gguf", type=type)
    exported(run, "gguf-adapter", tmp_path / "ann.gguf")
    with llama_cpp(tmp_path / "base.gguf", tmp_path / "ann.gguf") as model:
        found = perplexity(model, valid_windows(run))
    assert found == pytest.approx(done.export, rel=0.05)
    assert found < done.base / 10


@pytest.mark.parametrize(("family", "rule"), [("llama", "smollm"), ("llama-gpt2s-rule", "gpt-2")])
def test_text_is_cut_into_our_tokens(family, rule, tmp_path):
    run = trained("1g1s", family)
    exported(run, "gguf", tmp_path / "out")
    ours = api.open_personal_model(run, "ann")
    ours.close()
    assert rule_of(ours.tokenizer) == rule
    with llama_cpp(file_of(tmp_path / "out")) as model:
        for text in TEXTS:
            encoded = ours.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
            assert model.tokens(text) == encoded["input_ids"], text


def test_the_two_rules_differ_where_spaces_stand_before_a_digit():
    ours, gpt2s = (small_tokenizer(digits) for digits in (True, False))
    assert ours("at    12")["input_ids"] != gpt2s("at    12")["input_ids"]
    assert ours("at 12")["input_ids"] == gpt2s("at 12")["input_ids"]


@pytest.mark.parametrize("setting", ["1g1s", "four", "top1"])
def test_greedy_text_is_ours(setting, tmp_path):
    """In float32: a random model is so undecided that rounding to float16 chooses for it."""
    run = trained(setting)
    exported(run, "gguf", tmp_path / "out", type="float32")
    ours = api.open_personal_model(run, "ann")
    try:
        settings = {"max_new_tokens": 64, "do_sample": False, "no_repeat_ngram_size": 1}
        settings["eos_token_id"] = None
        prompt = torch.tensor([IDS[:10]])
        text = ours.model.generate(prompt, **settings, pad_token_id=0)[0, 10:].tolist()
    finally:
        ours.close()
    with llama_cpp(file_of(tmp_path / "out")) as model:
        found = model.greedy(IDS[:10], 64, once=True)
    assert len(set(text)) == 64
    assert found == text
