"""Tokens to text that can be sent, and the choice of the next token."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoTokenizer

from comigs.bases.mini import mini
from comigs.bases.tiny import byte_tokenizer
from comigs.personal.serve.jobs import Settings, TokenInfo
from comigs.personal.serve.sampling import choose, log_probabilities
from comigs.personal.serve.text import Transcript, Vocabulary

TEXT = "Grüße, 你好 🙂 — naïve café\n  42 items\t(ok)"


@pytest.fixture(scope="module")
def vocabularies():
    return {"mini": Vocabulary(mini()[1]), "bytes": Vocabulary(byte_tokenizer())}


def pieces_of(vocabulary, ids, stop=(), infos=False):
    """The pieces of a text whose last token is followed by its end."""
    transcript = Transcript(vocabulary, 0, stop)
    pieces = []
    for id in ids:
        pieces.append(transcript.add(id, TokenInfo(id, -1.0, (), 0) if infos else None))
        if pieces[-1].finish:
            return pieces
    return [*pieces, transcript.end("length")]


def ids_of(vocabulary, text):
    return vocabulary.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", ["mini", "bytes"])
def test_pieces_are_whole_characters_and_make_up_the_text(vocabularies, name):
    ids = ids_of(vocabularies[name], TEXT)
    pieces = pieces_of(vocabularies[name], ids)
    assert "".join(piece.text for piece in pieces) == TEXT
    assert not any("\N{REPLACEMENT CHARACTER}" in piece.text for piece in pieces)
    assert pieces[-1].num_tokens == len(ids) and pieces[-1].finish == "length"


@pytest.mark.parametrize("name", ["mini", "bytes"])
def test_any_tokens_are_decoded_as_the_tokenizer_does(vocabularies, name):
    """Bytes that are no text too, as models write them."""
    vocabulary = vocabularies[name]
    random = np.random.default_rng(0)
    for _ in range(50):
        ids = random.integers(len(vocabulary.tokenizer), size=30).tolist()
        text = "".join(piece.text for piece in pieces_of(vocabulary, ids))
        assert text == vocabulary.tokenizer.decode(ids, skip_special_tokens=True)


def test_every_token_has_the_bytes_it_writes(vocabularies):
    vocabulary = vocabularies["mini"]
    for id in range(len(vocabulary.tokenizer)):
        assert vocabulary.bytes_of(id).decode(errors="replace") == vocabulary.tokenizer.decode([id])


def test_names_of_tokens_tell_them_apart(vocabularies):
    vocabulary = vocabularies["bytes"]
    names = [vocabulary.name_of(id) for id in range(len(vocabulary.tokenizer))]
    assert len(set(names)) == len(names)
    assert "bytes:\\xff" in names and "a" in names


@pytest.mark.parametrize("name", ["mini", "bytes"])
@pytest.mark.parametrize(
    ("stop", "kept"),
    [
        (["好"], "Grüße, 你"),
        (["ve caf", "nope"], "Grüße, 你好 🙂 — naï"),
        (["naive", "\n  42"], "Grüße, 你好 🙂 — naïve café"),
        (["absent", "(ok) "], TEXT),
        (["Grüße"], ""),
    ],
)
def test_a_stop_text_ends_the_answer_before_it_however_tokens_cut_it(
    vocabularies, name, stop, kept
):
    pieces = pieces_of(vocabularies[name], ids_of(vocabularies[name], TEXT), stop, infos=True)
    assert "".join(piece.text for piece in pieces) == kept
    assert pieces[-1].finish == ("length" if kept == TEXT else "stop")
    offsets = [token.offset for piece in pieces for token in piece.tokens]
    assert offsets == sorted(offsets)
    assert kept == TEXT or all(offset < len(kept) for offset in offsets)


def test_what_may_be_a_stop_text_is_held_back_until_it_is_not(vocabularies):
    vocabulary = vocabularies["bytes"]
    texts = [
        piece.text for piece in pieces_of(vocabulary, ids_of(vocabulary, "aSTxSTOq"), ["STOP"])
    ]
    assert texts == ["a", "", "", "STx", "", "", "", "STOq", ""]


def test_tokens_come_with_the_text_they_belong_to(vocabularies):
    """A token that is a part of a character waits for the rest of it."""
    vocabulary = vocabularies["bytes"]
    pieces = pieces_of(vocabulary, ids_of(vocabulary, "aé"), infos=True)
    assert [(piece.text, len(piece.tokens)) for piece in pieces] == [
        ("a", 1),
        ("", 0),
        ("é", 2),
        ("", 0),
    ]


@pytest.fixture
def own_tokens(tmp_path):
    """A tokenizer with a special token that no list of it names, as Llama 3's <|eot_id|>, and one
    that is text, as <think>.
    """
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<|eot|>", special=True), AddedToken("<think>")])
    tokenizer.save_pretrained(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


def test_special_tokens_are_no_text_whether_the_tokenizer_lists_them_or_not(own_tokens):
    tokenizer = own_tokens
    assert len(tokenizer.all_special_ids) == 1
    ids = tokenizer("a<|eot|>b<think>c<|endoftext|>d", add_special_tokens=False)["input_ids"]
    text = "".join(piece.text for piece in pieces_of(Vocabulary(tokenizer), ids))
    assert text == tokenizer.decode(ids, skip_special_tokens=True) == "ab<think>cd"


def test_a_special_token_that_is_named_as_a_stop_text_ends_the_answer(own_tokens):
    tokenizer = own_tokens
    ids = tokenizer("abé<|eot|>cd", add_special_tokens=False)["input_ids"]
    pieces = pieces_of(Vocabulary(tokenizer), ids, ["b<", "<|eot|>"], infos=True)
    assert "".join(piece.text for piece in pieces) == "abé"
    assert pieces[-1].finish == "stop" and pieces[-1].num_tokens == 4  # bytes before it
    assert [token.id for piece in pieces for token in piece.tokens] == ids[:4]


# the next token


def draws(logits, number=4000, **settings):
    random = np.random.default_rng(1)
    asked = Settings(max_tokens=1, **settings)
    counts = np.bincount(
        [choose(logits, asked, random) for _ in range(number)], minlength=len(logits)
    )
    return counts / number


def test_temperature_zero_takes_the_likeliest():
    logits = torch.tensor([0.0, 3.0, 2.9])
    assert draws(logits, 20, temperature=0.0).tolist() == [0, 1, 0]


@pytest.mark.parametrize("settings", [{"temperature": 1e-320}, {"temperature": 1e-6}, {"top_p": 0}])
def test_what_is_nearly_nothing_takes_the_likeliest(settings):
    logits = torch.tensor([0.0, 300.0, 299.0, -300.0])
    assert draws(logits, 20, **settings).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_probabilities(temperature):
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    expected = (logits / temperature).softmax(dim=-1)
    assert np.abs(draws(logits, temperature=temperature) - expected.numpy()).max() < 0.025


@pytest.mark.parametrize("size", [5, 1000])
def test_top_p_draws_from_the_fewest_tokens_that_hold_the_mass(size):
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = torch.full((size,), -40.0)
    logits[-4:] = probabilities.log()
    for top_p, kept in [(0.4, 1), (0.5001, 2), (0.7, 2), (0.9, 3), (1.0, 4)]:
        found = draws(logits, 2000, top_p=top_p)
        assert (found[-4:] > 0).tolist() == [n < kept for n in range(4)]
        assert found[-4:].sum() == pytest.approx(1)


def test_top_p_with_a_flat_distribution_looks_beyond_the_head():
    logits = torch.zeros(1000)
    logits[900:] = -20
    found = draws(logits, 3000, top_p=0.5)
    assert found[900:].sum() == 0 and (found > 0).sum() > 400


def test_log_probabilities_are_the_models_own():
    logits = torch.tensor([0.0, 3.0, 1.0])
    logprob, top = log_probabilities(logits, 2, 2)
    total = math.log(sum(math.exp(x) for x in (0.0, 3.0, 1.0)))
    assert logprob == pytest.approx(1.0 - total, abs=1e-6)
    assert [id for id, _ in top] == [1, 2] and top[0][1] == pytest.approx(3.0 - total, abs=1e-6)
    assert log_probabilities(logits, 0, 0)[1] == ()
