"""Exports in fresh processes that cannot import comigs: transformers and PEFT load them.

One process loads all folders that a library is asked about: starting it takes longer than the rest.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from comigs.app import api
from tests.exports import base_of, elsewhere, exported, trained, valid_windows
from tests.naive import naive_model

IDS = list(range(100, 140))
TEXT = "The cat  12 sat, 2024   7\n\tGröße <|endoftext|>"
STANDARD = {"1g1s": "llama", "top1": "llama", "four": "llama", "client": "qwen2"}
EXPERTS = [  # ranks of 4, 2 and 3 in one folder, a base with Conv1D, and the rest of the world
    ("four", "llama", "generalist-1", 1),
    ("four", "llama", "specialist-0", 2),
    ("1g1s", "gpt2", "specialist-0", 1),
    ("others", "llama", "rest", 1),
    ("on-top", "llama", "generalist-0-specialist-0", 0),
]
FLAT = ["llama", "gpt2"]

TRANSFORMERS = """
import json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
ids, text, folders = json.loads(sys.argv[1])
said = {}
for name, folder in folders.items():
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    greedy = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0].tolist()
    tokens = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    said[name] = {"logits": logits.tolist(), "greedy": greedy, "tokens": tokens}
print(json.dumps(said))
"""
PEFT = """
import json, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
ids, folders = json.loads(sys.argv[1])
said = {}
for name, (base, folder, windows) in folders.items():
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, folder).eval()
    keys = model.load_adapter(folder, adapter_name="again")
    model.set_adapter("default")
    nats, tokens = 0.0, 0
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
        for inputs, targets in windows:
            found, wanted = model(torch.tensor([inputs])).logits[0], torch.tensor(targets)
            nats += float(torch.nn.functional.cross_entropy(found, wanted, reduction="sum"))
            tokens += len(targets)
    said[name] = {
        "logits": logits.tolist(), "wrong": [list(keys.missing_keys), list(keys.unexpected_keys)],
        "nats": nats, "tokens": tokens,
    }
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def transformers_says(tmp_path_factory):
    """What transformers makes of each exported model."""
    out = tmp_path_factory.mktemp("standard")
    for setting, family in STANDARD.items():
        exported(trained(setting, family), "transformers", out / setting, type="float32")
    folders = {setting: str(out / setting) for setting in STANDARD}
    return elsewhere(TRANSFORMERS, json.dumps([IDS, TEXT, folders]))


@pytest.fixture(scope="module")
def peft_says(tmp_path_factory):
    """What PEFT makes of each exported adapter, and the figures that the flat ones were given."""
    out = tmp_path_factory.mktemp("peft")
    asked, figures = {}, {}
    for setting, family, folder, _ in EXPERTS:
        whole = out / f"{setting}-{family}"
        if not whole.exists():
            exported(trained(setting, family), "peft", whole)
        asked[f"{setting}/{folder}"] = (str(base_of(family)), str(whole / folder), [])
    for family in FLAT:
        figures[family] = exported(trained("1g1s", family), "flat", out / f"flat-{family}")
        windows = valid_windows(trained("1g1s", family))
        asked[family] = (str(base_of(family)), str(out / f"flat-{family}"), windows)
    return elsewhere(PEFT, json.dumps([IDS, asked])), figures


def ours(run, change=lambda model: None):
    """Our own logits, tokens of TEXT, and greedy text."""
    model = api.open_personal_model(run, "ann")
    try:
        change(model)
        with torch.no_grad():
            logits = model.model(torch.tensor([IDS])).logits[0]
        tokens = model.tokenizer(TEXT, add_special_tokens=False, split_special_tokens=True)
        settings = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
        greedy = model.model.generate(torch.tensor([IDS]), **settings)[0].tolist()
        return logits, tokens["input_ids"], greedy
    finally:
        model.close()


@pytest.mark.parametrize("setting", list(STANDARD))
def test_transformers_answers_as_the_run_does(setting, transformers_says):
    logits, tokens, greedy = ours(trained(setting, STANDARD[setting]))
    said = transformers_says[setting]
    assert (torch.tensor(said["logits"]) - logits).abs().max() < 1e-4
    assert said["tokens"] == tokens
    assert said["greedy"] == greedy


def test_transformers_answers_as_the_naive_mixture_does(transformers_says):
    """Against the method written down a second time, too: every expert a whole MLP."""
    run = trained("four")
    model = api.open_personal_model(run, "ann")
    model.close()
    scale = 3**0.5  # three experts share a token's weight, so each is stronger by that (decision 9)
    saved = api.open_run(run).load("clients/ann/personal")
    for name, tensor in saved.items():
        if name.split(".")[2][0] in "gs" and name.endswith("B"):
            saved[name] = tensor * scale
    with torch.no_grad():
        logits = naive_model(model.model, saved, top_k=3)(torch.tensor([IDS])).logits[0]
    assert (torch.tensor(transformers_says["four"]["logits"]) - logits).abs().max() < 1e-4


def alone(number):
    """A change of a model that leaves one expert, with weight 1, and no router."""

    def change(model):
        for mixture in model.attachment.mixtures:
            one = [mixture.bound.experts[number]]
            mixture.bind(replace(mixture.bound, experts=one, W_ED=None, gate=None))

    return change


@pytest.mark.parametrize(("setting", "family", "folder", "number"), EXPERTS)
def test_peft_answers_as_each_expert_does(setting, family, folder, number, peft_says):
    said = peft_says[0][f"{setting}/{folder}"]
    logits, _, _ = ours(trained(setting, family), alone(number))
    assert said["wrong"] == [[], []]  # adapters whose keys do not match only warn
    assert (torch.tensor(said["logits"]) - logits).abs().max() < 1e-4


@pytest.mark.parametrize("family", FLAT)
def test_peft_has_the_perplexity_that_flat_was_given(family, peft_says):
    said, done = peft_says[0][family], peft_says[1][family]
    assert said["wrong"] == [[], []]
    assert said["tokens"] == done.tokens
    found = torch.tensor(said["nats"] / said["tokens"]).exp().item()
    assert found == pytest.approx(done.export, rel=1e-4)
