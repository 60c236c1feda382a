"""OpenAI's API with the real `openai` package over a real connection: what is offered and
answered.
"""

from __future__ import annotations

import time

import openai
import pytest

from tests.conftest import tiny
from tests.serving import HELLO, NAMES, ask, clients_on, serving


@pytest.fixture(scope="module")
def server():
    base = tiny("tiny-llama")
    with serving(base, clients_on(base)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def test_each_client_is_a_model(client):
    models = client.models.list().data
    assert [model.id for model in models] == NAMES
    assert client.models.retrieve("run/bob") == models[1] and models[1].owned_by == "comigs"


def test_health_answers_anybody(server):
    import httpx

    assert httpx.get(f"http://127.0.0.1:{server.port}/health").json() == {"status": "ok"}


# answers


def test_a_whole_chat_answer(client):
    answer = ask(client)
    (choice,) = answer.choices
    assert answer.object == "chat.completion" and answer.model == "run/ann"
    assert answer.id.startswith("chatcmpl-") and abs(answer.created - time.time()) < 60
    assert choice.message.role == "assistant" and choice.finish_reason == "length"
    assert choice.message.content and choice.logprobs is None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 8)  # a byte each
    assert answer.usage.total_tokens == 13


def test_a_whole_completion(client):
    answer = client.completions.create(model="run/bob", prompt="hello", max_tokens=4, temperature=0)
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")
    assert answer.choices[0].text and answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 4


def test_a_completion_is_short_unless_it_says_otherwise_and_a_chat_goes_on_to_the_end(client):
    assert client.completions.create(model="run/bob", prompt="hi").usage.completion_tokens <= 16
    answer = client.chat.completions.create(model="run/ann", messages=HELLO, temperature=0)
    assert answer.usage.total_tokens == 64 and answer.choices[0].finish_reason == "length"


def test_clients_have_models_of_their_own(client):
    assert len({ask(client, name).choices[0].message.content for name in NAMES}) == 4


def test_a_stream_of_chunks_makes_up_the_whole_answer(client):
    whole = ask(client)
    chunks = list(ask(client, stream=True))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_comes_last_where_it_is_asked_for(client):
    *chunks, last = ask(client, stream=True, stream_options={"include_usage": True})
    assert (
        last.choices == [] and last.usage.completion_tokens == 8 and last.usage.prompt_tokens == 5
    )
    assert chunks[-1].choices[0].finish_reason == "length"


def test_a_stream_of_a_completion(client):
    settings = {"model": "run/ann", "prompt": "hello", "max_tokens": 8, "temperature": 0}
    whole = client.completions.create(**settings)
    chunks = list(client.completions.create(**settings, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_the_stream_helper_sees_every_piece(client):
    whole = ask(client, stop=["\x00"], max_tokens=8)
    with client.chat.completions.stream(
        model="run/ann", messages=HELLO, max_tokens=8, temperature=0
    ) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        snapshot = stream.current_completion_snapshot
    assert "".join(pieces) == whole.choices[0].message.content
    assert snapshot.choices[0].message.content == whole.choices[0].message.content
    assert snapshot.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_a_chat(client, stream):
    answer = ask(client, logprobs=True, top_logprobs=3, stream=stream, stop=["\x00\x00"])
    if stream:
        tokens = [
            t for chunk in answer if (told := chunk.choices[0].logprobs) for t in told.content
        ]
    else:
        tokens = answer.choices[0].logprobs.content
    assert len(tokens) == 8
    for token in tokens:
        assert token.logprob < 0 and len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == token.logprob  # temperature 0 took the likeliest
        assert bytes(token.bytes).decode(errors="replace") == token.token
    written = b"".join(bytes(token.bytes) for token in tokens).decode(errors="replace")
    assert written == ask(client).choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_a_completion(client, stream):
    answer = client.completions.create(
        model="run/ann", prompt="hello", max_tokens=6, temperature=0, logprobs=2, stream=stream
    )
    chunks = answer if stream else [answer]
    parts = [chunk.choices[0].logprobs for chunk in chunks]
    parts = [part for part in parts if part is not None]
    assert sum(len(part.tokens) for part in parts) == 6
    for part in parts:
        likeliest = [max(top.values()) for top in part.top_logprobs]
        assert part.token_logprobs == likeliest and {len(top) for top in part.top_logprobs} == {2}
    offsets = [offset for part in parts for offset in part.text_offset]
    assert offsets[0] == 0 and offsets == sorted(offsets)


def test_a_stop_text_ends_the_answer_and_is_not_in_it(client):
    text = ask(client, max_tokens=20).choices[0].message.content
    stop = text[5:7]
    for answer in (
        ask(client, max_tokens=20, stop=stop),
        ask(client, max_tokens=20, stop=["never", stop]),
    ):
        assert answer.choices[0].message.content == text[: text.index(stop)]
        assert answer.choices[0].finish_reason == "stop"
    pieces = list(ask(client, max_tokens=20, stop=stop, stream=True))
    written = "".join(chunk.choices[0].delta.content or "" for chunk in pieces)
    assert written == text[: text.index(stop)] and pieces[-1].choices[0].finish_reason == "stop"


def test_a_seed_repeats_a_draw(client):
    def drawn(seed):
        return ask(client, temperature=1, seed=seed, max_tokens=12).choices[0].message.content

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(4)}) > 1
    assert len({drawn(None) for _ in range(4)}) > 1


@pytest.mark.parametrize("stream", [False, True])
def test_several_choices_and_prompts(client, stream):
    answer = client.completions.create(
        model="run/ann",
        prompt=["hello", "world!"],
        n=3,
        temperature=1,
        seed=3,
        max_tokens=5,
        stream=stream,
    )
    texts = dict.fromkeys(range(6), "")
    for part in answer if stream else [answer]:
        for choice in part.choices:
            texts[choice.index] += choice.text
    assert len(set(texts.values())) == 6 and all(texts.values())
    if not stream:
        assert answer.usage.prompt_tokens == 11 and answer.usage.completion_tokens == 30


def test_a_prompt_may_be_token_ids(client):
    as_text = client.completions.create(model="run/ann", prompt="hello", temperature=0)
    tokenizer = tiny("tiny-llama").tokenizer
    ids = tokenizer("hello", add_special_tokens=False)["input_ids"]
    for prompt in (ids, [ids]):
        answer = client.completions.create(model="run/ann", prompt=prompt, temperature=0)
        assert answer.choices[0].text == as_text.choices[0].text


def test_messages_in_parts_and_what_asks_for_nothing_special_are_taken(client):
    plain = ask(client)
    parts = [{"type": "text", "text": text} for text in ("hel", "lo")]
    answer = client.chat.completions.create(
        model="run/ann",
        messages=[{"role": "user", "content": parts}],
        max_completion_tokens=8,
        temperature=0,
        frequency_penalty=0,
        presence_penalty=0,
        user="me",
        response_format={"type": "text"},
        logit_bias={},
        tools=[],
    )
    assert answer.choices[0].message.content == plain.choices[0].message.content


def test_a_chat_without_a_template_is_one_text_to_go_on_from(client):
    messages = [
        {"role": "system", "content": "be"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": " there"},
        {"role": "developer", "content": "now"},
    ]
    chat = client.chat.completions.create(
        model="run/ann", messages=messages, max_tokens=6, temperature=0
    )
    text = client.completions.create(
        model="run/ann", prompt="be\nhi there\nnow", max_tokens=6, temperature=0
    )
    assert chat.choices[0].message.content == text.choices[0].text


def test_an_answer_comes_back_as_the_client_dumps_it(client):
    """With null for what it has not."""
    answer = ask(client, temperature=0).choices[0].message.model_dump()
    assert None in answer.values()
    messages = [{"role": "user", "content": "hi"}, answer, {"role": "user", "content": "more"}]
    again = client.chat.completions.create(model="run/ann", messages=messages, max_tokens=3)
    assert again.choices[0].message.role == "assistant"


def test_a_chat_template_is_used_where_there_is_one():
    base = tiny("tiny-llama")
    base.tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('no system, please') }}{% endif %}"
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    with serving(base, clients_on(base)) as server:
        client = server.client()
        chat = ask(client)
        text = client.completions.create(
            model="run/ann", prompt="<user>hello<assistant>", max_tokens=8, temperature=0
        )
        assert chat.choices[0].message.content == text.choices[0].text
        with pytest.raises(openai.BadRequestError, match="no system, please") as refused:
            client.chat.completions.create(
                model="run/ann", messages=[{"role": "system", "content": "x"}]
            )
        assert refused.value.param == "messages"
