"""Bases: found by name, frozen, and told apart by what is in them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from comigs.bases.base import linear_size
from comigs.bases.load import architecture_of, load_base, loaders, modules
from comigs.bases.tiny import byte_tokenizer
from comigs.bases.tokenizer import TextEncoder
from comigs.config import BaseSection
from comigs.errors import UserError
from tests.conftest import bits, tiny
from tests.families import SMALL


def test_a_loaded_base_is_frozen_in_evaluation_mode_and_as_asked(base):
    assert not any(p.requires_grad for p in base.model.parameters())
    assert not any(m.training for m in base.model.modules())
    assert {p.dtype for p in base.model.parameters()} == {
        torch.float32
    } and base.dtype == torch.float32
    assert base.device.type == "cpu"


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_weights_have_the_dtype_asked_for(dtype):
    base = tiny("tiny-llama", dtype)
    assert {p.dtype for p in base.model.parameters()} == {getattr(torch, dtype)} == {base.dtype}


def test_automatic_choices_are_made_and_said():
    base = load_base(BaseSection(name="tiny-gpt2"))
    assert base.dtype in (torch.float32, torch.bfloat16) and base.device.type in ("cpu", "cuda")


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_tiny_bases_are_the_same_every_time_and_leave_the_global_generator_alone(name):
    before = torch.get_rng_state()
    first = tiny(name)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(123)
    second = tiny(name)
    assert first.fingerprint == second.fingerprint
    states = [{k: bits(v) for k, v in base.model.state_dict().items()} for base in (first, second)]
    assert states[0] == states[1]


def test_the_fingerprint_tells_one_changed_weight_another_dtype_and_another_tokenizer():
    from comigs.bases.load import _fingerprint

    base = tiny("tiny-gpt2")
    found = {
        base.fingerprint,
        tiny("tiny-gpt2", "bfloat16").fingerprint,
        tiny("tiny-llama").fingerprint,
    }
    base.model.transformer.h[1].mlp.c_fc.weight[3, 4] += 1e-3
    found.add(_fingerprint(base.model, base.encoder))
    other = byte_tokenizer()
    other.add_tokens(["word"])
    found.add(_fingerprint(base.model, TextEncoder(other, base.encoder.chats)))
    assert len(found) == 5


def test_a_local_folder_is_a_base_too(tmp_path):
    base = tiny("tiny-llama")
    base.model.save_pretrained(tmp_path / "mine")
    base.tokenizer.save_pretrained(tmp_path / "mine")
    again = load_base(BaseSection(name=str(tmp_path / "mine"), dtype="float32", device="cpu"))
    input_ids = torch.arange(12)[None]
    assert bits(again.model(input_ids).logits) == bits(base.model(input_ids).logits)
    assert again.architecture is base.architecture


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tiny-gpt", 'unknown base "tiny-gpt".*Did you mean "tiny-gpt2"'),
        ("no-such-folder", "unknown base.*local folder, a .gguf file, or a hub name"),
        ("../../etc/passwd", "unknown base"),
    ],
)
def test_a_base_that_is_not_there_is_refused_in_one_line(name, said):
    with pytest.raises(UserError, match=said) as raised:
        load_base(BaseSection(name=name))
    assert "\n" not in str(raised.value)


def test_a_folder_that_is_no_model_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot be loaded") as raised:
        load_base(BaseSection(name=str(tmp_path)))
    assert "\n" not in str(raised.value)


def test_an_unknown_family_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r'"bloom" is not known; known: gemma, gemma2, .*, llama'):
        architecture_of(AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", **SMALL)))


@pytest.mark.parametrize(
    ("device", "said"), [("gpu", "is no device"), ("cuda:99", "is not on this machine")]
)
def test_a_device_that_is_not_there_is_refused(device, said):
    with pytest.raises(UserError, match=said):
        load_base(BaseSection(name="tiny-gpt2", device=device))


def test_no_two_families_claim_the_same_model_type():
    types = [
        t
        for m in modules().values()
        if hasattr(m, "ARCHITECTURE")
        for t in m.ARCHITECTURE.model_types
    ]
    assert len(types) == len(set(types))
    assert {"mini", "tiny-gpt2", "tiny-llama"} <= loaders().keys()


def test_sizes_of_both_kinds_of_linear():
    assert linear_size(nn.Linear(3, 5)) == linear_size(Conv1D(5, 3)) == (3, 5)


def test_text_is_tokens_and_back_and_special_tokens_in_text_stay_text(base):
    texts = ["héllo\n", "a <|endoftext|> b", "", "日本"]
    ids = base.encoder.encode(texts)
    assert [base.tokenizer.decode(i) for i in ids] == texts
    assert [len(i) for i in ids] == [len(text.encode()) for text in texts]  # a token per byte
    assert base.encoder.separator == 256 and not any(256 in i for i in ids)
    assert (
        max(max(i, default=0) for i in ids)
        < base.encoder.vocabulary_size
        == base.model.config.vocab_size
    )
