"""SmolLM2-135M exported and read by llama.cpp and transformers: slow, and needs its wheel."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from comigs.app import api
from comigs.app.export import export
from comigs.config import parse_config
from tests.conftest import APART
from tests.exports import elsewhere, valid_windows
from tests.llama_cpp import llama_cpp
from tests.test_export_llama_cpp import file_of, perplexity

pytestmark = pytest.mark.slow
DATA = Path(__file__).parent.parent / "data" / "multilingual"
PROMPT = "Le système Debian est"


def documents(language, split):
    """The texts of a split of the bundled manual pages."""
    with gzip.open(DATA / f"{language}.{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A few steps on a few pages, with routers that start so large that tokens are routed."""
    root = tmp_path_factory.mktemp("smollm2")
    for split, characters in (("train", 40_000), ("valid", 8_000), ("test", 2_000)):
        text = "\n\n".join(documents("fr", split))[:characters]
        (root / f"{split}.jsonl").write_text(json.dumps({"text": text}), encoding="utf-8")
    config = parse_config({
        "rounds": 1,
        "base": {"name": "smollm2-135m", "dtype": "float32", "device": "cpu", "threads": 1},
        "data": {"root": str(root), "cache": str(root / "cache")},
        "experts": {"generalists": 1, "specialists": 1, "router_start": 0.1},
        "options": APART,
        "client": {
            "steps": 6, "batch_size": 2, "lr": 2e-3, "router_every": 3, "router_steps": 2,
        },
        "evaluation": {"every": 0, "keep": "last"},
        "clients": [{
            "name": "fr",
            "text": {split: f"{split}.jsonl" for split in ("train", "valid", "test")},
        }],
    })  # fmt: skip
    return api.run(config, root / "run").path


@pytest.fixture(scope="module")
def windows(run):
    return valid_windows(run, "fr")[:12]


@pytest.fixture(scope="module")
def ours(run):
    """Our perplexity on these windows, logits of the first, greedy text, tokens of documents."""
    model = api.open_personal_model(run, "fr")
    found = {}
    try:
        nats, tokens = 0.0, 0
        for inputs, targets in valid_windows(run, "fr")[:12]:
            with torch.no_grad():
                logits = model.model(torch.tensor([inputs])).logits[0]
            wanted = torch.tensor(targets)
            nats += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
            tokens += len(targets)
            if "logits" not in found:
                weights = [r.weights_TE[:, 0] for r in model.attachment.routings()]
                assert torch.stack(weights).std(dim=1).max() > 0.02  # it does route
                found["logits"] = logits
        found["perplexity"] = torch.tensor(nats / tokens).exp().item()
        ids = model.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
        settings = {"max_new_tokens": 64, "do_sample": False}
        text = model.model.generate(
            torch.tensor([ids]), **settings, eos_token_id=None, pad_token_id=2
        )
        assert len(set(text[0].tolist())) > 10  # no single token for ever
        found["ids"], found["greedy"] = ids, text[0, len(ids) :].tolist()
        found["texts"] = documents("de", "test")[:40]
        found["texts"] += ["in  1999   and    7 or 12", "x  " * 5 + "3"]
        found["tokens"] = model.tokenizer(
            found["texts"], add_special_tokens=False, split_special_tokens=True
        )["input_ids"]
    finally:
        model.close()
    return found


def test_float16_is_ours(run, ours, windows, tmp_path):
    """The same 64 tokens, every document cut into our tokens, and perplexity within 0.01 %.

    That is what the file's numbers are worth. llama.cpp rounds what it multiplies them with to
    float16, too, which is noise of its own: 0.02 % on so few windows.
    """
    done = export(run, "fr", "gguf", tmp_path / "out")
    assert done.exact and done.export == pytest.approx(done.personal, rel=1e-4)
    with llama_cpp(file_of(tmp_path / "out")) as model:
        assert perplexity(model, windows) == pytest.approx(ours["perplexity"], rel=5e-4)
        assert model.greedy(ours["ids"], 64) == ours["greedy"]
        for text, tokens in zip(ours["texts"], ours["tokens"], strict=True):
            assert model.tokens(text) == tokens, text[:200]


def test_float32_has_our_logits(run, ours, windows, tmp_path):
    export(run, "fr", "gguf", tmp_path / "out", "float32")
    with llama_cpp(file_of(tmp_path / "out")) as model:
        assert (model.logits(windows[0][0]) - ours["logits"]).abs().max() < 1e-3


@pytest.mark.parametrize(("type", "most"), [("q8_0", 0.01), ("q4_1", 0.02)])
def test_a_shared_base_and_an_adapter_keep_the_person(run, ours, windows, type, most, tmp_path):
    export(run, "fr", "gguf-base", tmp_path / "base.gguf", type)
    done = export(run, "fr", "gguf-adapter", tmp_path / "fr.gguf")
    assert done.bytes < 12e6
    with llama_cpp(tmp_path / "base.gguf", tmp_path / "fr.gguf") as model:
        assert abs(perplexity(model, windows) / ours["perplexity"] - 1) < most


def test_transformers_has_our_logits(run, ours, windows, tmp_path):
    export(run, "fr", "transformers", tmp_path / "out", "float32")
    program = """
import json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
with torch.no_grad():
    logits = model(torch.tensor([json.loads(sys.argv[2])])).logits[0]
torch.save(logits, sys.argv[3])
texts = json.loads(sys.argv[4])
encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
print(json.dumps([encoded, tokenizer.chat_template is not None]))
"""
    texts = json.dumps(ours["texts"][-2:])
    place = tmp_path / "logits.pt"
    encoded, has_template = elsewhere(
        program, tmp_path / "out", json.dumps(windows[0][0]), place, texts
    )
    assert (torch.load(place) - ours["logits"]).abs().max() < 1e-3
    assert encoded == ours["tokens"][-2:] and has_template
