"""Exports in llama.cpp itself: logits, perplexity, tokens and greedy text against ours."""

from __future__ import annotations

import math

import gguf
import numpy as np
import pytest
import torch
from tokenizers import AddedToken, normalizers, pre_tokenizers
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from comigs.app import api
from comigs.errors import UserError
from comigs.personal.export.gguf_file import write_gguf
from comigs.personal.export.gguf_text import notes_on, rule_of
from tests.exports import SHAPE, exported, small_tokenizer, trained, valid_windows
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
    ("1g1s", "llama-untied"),
]  # fmt: skip
SHARED = [
    ("1g1s", "llama"), ("four", "llama"), ("top1", "llama"), ("fedavg", "llama"),
    ("fdlora", "llama"), ("1g1s", "qwen2"), ("1g1s", "qwen3"), ("1g1s", "llama-untied"),
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
@pytest.mark.few(5)
def test_a_merged_model_has_our_logits(setting, family, tmp_path):
    run = trained(setting, family)
    exported(run, "gguf", tmp_path / "out", type="float32")
    with llama_cpp(file_of(tmp_path / "out")) as model:
        assert (model.logits(IDS) - logits_of(run)).abs().max() < 1e-3


@pytest.mark.parametrize(("setting", "family"), SHARED)
@pytest.mark.few(3)
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
@pytest.mark.parametrize(("type", "rel"), [("float16", 5e-4), ("bfloat16", 1e-3), ("q8_0", 4e-3)])
@pytest.mark.few(4)
def test_a_stored_type_has_the_perplexity_that_was_said(setting, type, rel, tmp_path):
    run = trained(setting)
    done = exported(run, "gguf", tmp_path / "out", type=type)
    with llama_cpp(file_of(tmp_path / "out")) as model:
        found = perplexity(model, valid_windows(run))
    assert found == pytest.approx(done.export, rel=rel)
    if type == "float16" and done.exact:
        assert found == pytest.approx(done.personal, rel=5e-4)  # within 0.05 % of the run's own


@pytest.mark.parametrize("type", ["q8_0", "q4_1", "q4_0", "q5_1", "q5_0", "bfloat16"])
@pytest.mark.few(2)
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
@pytest.mark.few(1)
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


def test_a_tokenizer_that_changes_text_or_does_not_cut_it_into_words_has_no_rule():
    changed, whole = small_tokenizer(), small_tokenizer()
    changed.backend_tokenizer.normalizer = normalizers.Lowercase()
    whole.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    for tokenizer, said in ((changed, r"changes text.*Lowercase"), (whole, "cuts text in a way")):
        with pytest.raises(UserError, match=said):
            rule_of(tokenizer)


def test_a_tokenizer_that_composes_letters_is_written_and_that_is_said():
    """As Qwen2's does, which llama.cpp reads without."""
    tokenizer = small_tokenizer()
    assert notes_on(tokenizer) == []
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    assert rule_of(tokenizer) == "smollm"
    assert "Unicode NFC" in notes_on(tokenizer)[0]


def test_what_ends_a_text_here_ends_it_in_llama_cpp_and_a_conversation_has_its_template(tmp_path):
    """A base with two ends of text, a token that it has no row for, and two chat templates."""
    tokenizer = small_tokenizer()
    end, image = AddedToken("<|done|>", special=True), AddedToken("<image>", special=True)
    tokenizer.add_tokens([end, image])
    tokenizer.chat_template = {"default": "{{ messages[0].content }}:", "tool_use": "x"}
    done, rows = tokenizer.convert_tokens_to_ids("<|done|>"), len(tokenizer) - 1
    config = AutoConfig.for_model("llama", **{**SHAPE, "vocab_size": rows})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id = [0, done]
    write_gguf(tmp_path / "it.gguf", model, tokenizer, "float32", "it")
    fields = gguf.GGUFReader(tmp_path / "it.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == "{{ messages[0].content }}:"
    with llama_cpp(tmp_path / "it.gguf") as there:
        ends = [id for id in range(rows) if there.is_end(id)]
        text = tokenizer("a <image>", split_special_tokens=True)["input_ids"]
        assert there.tokens("a <image>") == text
    assert ends == [0, done]
