"""A conversation with a personal model: what it reads, what it keeps, and how it behaves in a
terminal.
"""

from __future__ import annotations

import json
import os
from contextlib import closing

import pytest
import torch

from comigs import load_config
from comigs.app import api
from comigs.bases.tiny import byte_tokenizer
from comigs.errors import UserError
from comigs.personal.chat import Chat, Style
from comigs.personal.model import PersonalModel
from comigs.personal.prompts import conversation_ids, plain_text, text_ids
from tests.runs import finished, write_config

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture
def folder():
    return api.open_run(finished() / "run")


@pytest.fixture
def said():
    return []


@pytest.fixture
def chat(folder, said):
    with closing(
        Chat(folder, api.base_of(folder), "ann", Style(max_new_tokens=8), said.append)
    ) as chat:
        yield chat


def ask(chat, text):
    return "".join(chat.ask(text))


@pytest.fixture
def alone(folder):
    """What a client's model writes after a text: by transformers, on a base of its own."""
    with closing(PersonalModel(folder, "ann", api.base_of(folder))) as model:
        yield lambda text, count=8: model.generate(text, max_new_tokens=count)[len(text) :]


def test_an_answer_goes_on_from_the_whole_conversation(chat, alone):
    first = ask(chat, "the cat")
    assert first == alone("the cat")
    assert ask(chat, "and") == alone(f"the cat{first}\nand")
    assert [turn["role"] for turn in chat.turns] == ["user", "assistant"] * 2


def test_what_was_read_stays_read(chat, monkeypatch):
    """Only what is new of a conversation goes through the model."""
    chat.base.tokenizer.chat_template = TEMPLATE
    lengths, forward = [], chat._model.forward
    monkeypatch.setattr(chat._model, "forward", lambda p: lengths.append(len(p.ids)) or forward(p))
    ask(chat, "the cat")
    assert lengths == [len("<u>the cat<a>")] + [1] * 7
    lengths.clear()
    ask(chat, "sat")
    whole = len(conversation_ids(chat.base.tokenizer, chat.turns[:-1]))
    assert lengths[0] < whole - len("<u>the cat<a>") + 3 and lengths[1:] == [1] * 7


def test_a_chat_template_is_used_where_there_is_one(chat, alone):
    chat.base.tokenizer.chat_template = TEMPLATE
    chat.set_system("be")
    assert ask(chat, "hi") == alone("<s>be<u>hi<a>")


def test_the_system_text_begins_anew_and_stays(chat, alone):
    plain = ask(chat, "the cat")
    chat.set_system("dogs on mats")
    assert chat.turns == []
    after = ask(chat, "the cat")
    assert after == alone("dogs on mats\nthe cat") != plain
    chat.reset()
    assert chat.turns == [] and ask(chat, "the cat") == after
    chat.set_system("")
    assert ask(chat, "the cat") == plain


def test_a_seed_repeats_a_conversation(folder, said):
    def written(seed):
        style = Style(8, temperature=1.5, seed=seed)
        with closing(Chat(folder, api.base_of(folder), "ann", style, said.append)) as chat:
            return ask(chat, "the cat"), ask(chat, "the cat")

    assert written(1) == written(1) != written(2)
    assert written(None) != written(None)


def test_history_that_outgrows_the_base_is_cut_at_whole_turns_and_said(chat, said, alone):
    """The base reads 64 tokens, a byte each, and an answer of 8 has room."""
    begin, told = 0, []
    for number in range(6):
        question = f"{number}" * 10
        turns = [*chat.turns, {"role": "user", "content": question}]
        before = begin
        while len(text_ids(chat.base.tokenizer, plain_text(turns[begin:]))) > 56:
            begin += 2
        if begin > before:
            cut = f"({begin // 2} of {number} turns no longer fit, and are not read any more)"
            told.append(cut)
        assert ask(chat, question) == alone(plain_text(turns[begin:]))
        assert said == told
    assert begin > 2 and len(told) > 2
    assert len(chat.turns) == 12  # what was said is not lost


def test_a_message_that_is_too_long_alone_is_refused_and_forgotten(chat):
    ask(chat, "the cat")
    with pytest.raises(
        UserError, match="your message: 57 tokens, and the base reads 56 before an answer"
    ):
        ask(chat, "x" * 57)
    assert len(chat.turns) == 2
    assert ask(chat, "x" * 56)


def test_a_long_answer_leaves_half_of_the_window_to_the_conversation(folder, said):
    with closing(
        Chat(folder, api.base_of(folder), "ann", Style(max_new_tokens=999), said.append)
    ) as chat:
        assert ask(chat, "x" * 32)
        with pytest.raises(UserError, match="reads 32 before an answer"):
            ask(chat, "x" * 33)


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_went(chat):
    pieces = chat.ask("the cat")
    first = next(pieces)
    pieces.close()
    assert chat.turns[-1] == {"role": "assistant", "content": first}
    assert ask(chat, "and")


def test_another_client_answers_on_the_same_base(chat, folder):
    ann = ask(chat, "the cat")
    weights = chat.base.model
    chat.change_client("bob")
    assert chat.client == "bob" and chat.base.model is weights and len(chat.turns) == 2
    chat.reset()
    bob = ask(chat, "the cat")
    chat.change_client("ann")
    chat.reset()
    assert ask(chat, "the cat") == ann != bob


def test_a_client_that_is_none_leaves_the_one_there_is(chat):
    before = ask(chat, "the cat")
    with pytest.raises(UserError, match=r'client: no client "bop".*bob|bop'):
        chat.change_client("bop")
    chat.reset()
    assert chat.client == "ann" and ask(chat, "the cat") == before


def test_a_conversation_is_saved_for_its_owner_alone_and_nothing_is_overwritten(chat, tmp_path):
    chat.set_system("be")
    answer = ask(chat, "the cat")
    file = tmp_path / "said.json"
    chat.save(file)
    assert json.loads(file.read_text(encoding="utf-8")) == {
        "model": "run/ann",
        "messages": [
            {"role": "system", "content": "be"},
            {"role": "user", "content": "the cat"},
            {"role": "assistant", "content": answer},
        ],
    }
    assert file.stat().st_mode & 0o777 == 0o600
    before = file.read_bytes()
    with pytest.raises(UserError, match="exists already"):
        chat.save(file)
    with pytest.raises(UserError, match=r"cannot be written|no permission"):
        chat.save(tmp_path / "none" / "said.json")
    assert file.read_bytes() == before and os.listdir(tmp_path) == ["said.json"]


@pytest.mark.parametrize(
    ("method", "shown"), [("comigs", -1), ("pfedmoe", 0), ("comigs-others", -1)]
)
def test_routes_are_the_weights_of_the_router_on_each_token_of_the_answer(
    tmp_path, said, method, shown
):
    """By hand: the generalist is the first of two experts, everybody's generalist the last."""
    given = [f'data.cache="{tmp_path / "cache"}"', f"method={method}", "experts.router_start=0.5"]
    if method == "comigs":
        given.append("options.finish=mixture")
    folder = api.run(load_config(write_config(tmp_path), given), tmp_path / "run")
    with closing(
        Chat(folder, api.base_of(folder), "ann", Style(max_new_tokens=8), said.append)
    ) as chat:
        with pytest.raises(UserError, match="no answer"):
            chat.routes()
        answer = ask(chat, "the cat")
        routes, tokenizer = chat.routes(), chat.base.tokenizer
        read, written = chat._last
    ids = read + written
    assert tokenizer.decode(ids) == "the cat" + answer
    with closing(PersonalModel(folder, "ann", api.base_of(folder))) as model:
        with torch.no_grad():
            model.model(torch.tensor([ids]), use_cache=False)
        weights = [r.weights_TE[-len(routes) :, shown] for r in model.attachment.routings()]
    assert [weight for _, weight in routes] == pytest.approx((sum(weights) / 2).tolist(), abs=1e-6)
    assert len(routes) == len(ids) - len("the cat")
    assert all(0 <= weight <= 1 for _, weight in routes)


def test_a_token_that_the_base_has_no_row_for_is_refused_and_forgotten(chat):
    chat.base.tokenizer.add_special_tokens({"pad_token": "<image>"})
    with pytest.raises(UserError, match='your message: holds "<image>", which this base does not'):
        ask(chat, "an <image>")
    assert chat.turns == []
    assert ask(chat, "the cat ")


def test_an_empty_text_goes_on_from_what_stands_before_each_document():
    tokenizer = byte_tokenizer()
    assert text_ids(tokenizer, "") == [256]
    tokenizer.eos_token = None  # some tokenizers have a beginning of text alone
    assert text_ids(tokenizer, "") == [256]
