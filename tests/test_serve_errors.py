"""What is wrong with a request is an error in OpenAI's shape, and a key opens one model."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from contextlib import ExitStack
from unittest.mock import patch

import httpx
import openai
import pytest

from comigs.personal.serve.app import Api
from comigs.personal.serve.keys import Keys
from comigs.personal.serve.server import Connection
from tests.conftest import tiny
from tests.serving import HELLO, NAMES, answer_to, ask, clients_on, raw_request, serving

PICTURE = {"type": "image_url", "image_url": {"url": "x"}}
KEYS = {name: f"key-of-{name}-which-is-long-enough" for name in NAMES}


@pytest.fixture(scope="module")
def server():
    base = tiny("tiny-llama")
    with serving(base, clients_on(base)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return server.client()


@pytest.mark.parametrize(
    ("given", "param", "said"),
    [
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"temperature": "warm"}, "temperature", "valid number"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 2.5}, "max_tokens", "valid integer"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens", "not both"),
        ({"top_p": -0.1}, "top_p", "greater than or equal to 0"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 17}, "n", "16 or less"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"stop": [""]}, "stop", "none empty"),
        ({"stop": ["a"] * 5}, "stop", "up to 4"),
        ({"stop": 5}, "stop", "valid string"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "required"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "messages.0.role", "'user'"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "valid string"),
        ({"messages": [{**HELLO[0], "content": [PICTURE]}]}, "messages.0.content.0.type", "'text'"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs = true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "leave it out"),
        ({"logit_bias": {"5": 10}}, "logit_bias", "leave it out"),
        ({"response_format": {"type": "json_object"}}, "response_format", "leave it out"),
        ({"extra_body": {"top_k": 5}}, "top_k", "not permitted"),
        ({"messages": [{"role": "user", "content": "x" * 64}]}, "messages", "room for 64 together"),
    ],
)  # fmt: skip
def test_a_malformed_request_is_400_with_the_field(client, given, param, said):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, **given) if "messages" not in given else client.chat.completions.create(
            model="run/ann", **given
        )
    error = refused.value
    assert error.param == param and said in error.message and error.type == "invalid_request_error"
    assert error.message.count("\n") == 0


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [257]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": "x", "logprobs": 6}, "logprobs"),
        ({"prompt": "x", "best_of": 3}, "best_of"),
        ({"prompt": "x", "echo": True}, "echo"),
        ({"prompt": "x" * 64}, "prompt"),
    ],
)
def test_a_malformed_completion_is_400_with_the_field(client, given, param):
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="run/ann", **given)
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("path", "given", "said"),
    [
        ("completions", {"prompt": ["a"] * 50_000}, "prompt: must be 256 prompts or fewer"),
        ("completions", {"prompt": [[1]] * 50_000}, "prompt: must be 256 prompts or fewer"),
        ("completions", {"prompt": [1.5] * 50_000}, "150,001 mistakes"),
        ("chat/completions", {"messages": [{}] * 60_000}, "120,000 mistakes"),
        ("chat/completions", {"messages": HELLO, **dict.fromkeys(map(str, range(9000)), 1)}, "9,0"),
    ],
)
def test_a_body_full_of_mistakes_keeps_nobody_waiting(server, path, given, said):
    """To read each prompt, or tell each mistake, took seconds in which nobody else was answered."""
    body = json.dumps({"model": "run/ann", **given}).encode()
    with patch("comigs.personal.serve.app.prompts_of", side_effect=AssertionError("read")):
        status, answer = answer_to(raw_request(server, body, f"/v1/{path}"))
    assert status == 400 and said in answer["error"]["message"]


def test_a_model_that_does_not_exist(client):
    for call in (lambda: ask(client, "run/zed"), lambda: client.models.retrieve("run/zed")):
        with pytest.raises(openai.NotFoundError) as refused:
            call()
        assert refused.value.code == "model_not_found" and refused.value.param == "model"


@pytest.mark.parametrize(
    ("body", "headers", "status", "code"),
    [
        (b"{", {}, 400, None),
        (b"[1]", {}, 400, None),
        (b'{"model": NaN}', {}, 400, None),
        (b'"\\ud800"', {}, 400, None),
        (b"[" * 10**5, {}, 400, None),
        (b"\xff", {}, 400, None),
        (b"{}", {"Content-Type": "text/plain"}, 415, None),
        (b"{}", {"Host": "evil.example"}, 403, None),
        (b"{}", {"Host": "127.0.0.1.evil.example:80"}, 403, None),
        (b"{}", {"Host": "localhost:8000"}, 400, None),
        (b"{}", {"Host": "[::1]:8000"}, 400, None),
        (b" " * (2**18 + 1), {}, 413, "body_too_large"),
    ],
)
def test_what_is_no_request_is_an_error_in_openais_shape(server, body, headers, status, code):
    found, content = answer_to(raw_request(server, body, **headers))
    assert found == status
    assert content["error"].keys() == {"message", "type", "param", "code"}
    assert content["error"]["code"] == code and content["error"]["message"]


def test_a_body_that_never_comes_is_given_up(server, monkeypatch):
    monkeypatch.setattr("comigs.personal.serve.app.BODY_SECONDS", 0.2)
    status, content = answer_to(raw_request(server, b"x", **{"Content-Length": "100"}))
    assert status == 408 and "must arrive within 0.2 seconds" in content["error"]["message"]


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nhost: "])
def test_a_connection_that_asks_for_nothing_is_closed(monkeypatch, sent):
    """A thousand of them kept everybody else out for as long as they stayed, without a key."""
    monkeypatch.setattr("comigs.personal.serve.server.MAX_CONNECTIONS", 2)
    monkeypatch.setattr(Connection, "seconds", 1.5)
    base = tiny("tiny-llama")
    with serving(base, clients_on(base)) as server, ExitStack() as stack:
        idle = []
        for _ in range(2):
            idle.append(stack.enter_context(socket.create_connection(("127.0.0.1", server.port))))
            idle[-1].settimeout(10)
            idle[-1].sendall(sent)
        url = f"http://127.0.0.1:{server.port}/health"
        assert httpx.get(url).status_code == 503
        assert [connection.recv(1) for connection in idle] == [b"", b""]
        assert httpx.get(url).status_code == 200


def test_a_connection_that_has_had_an_answer_has_as_long_again(monkeypatch):
    """And is closed then, whatever it sends that is no request."""
    monkeypatch.setattr(Connection, "seconds", 1.0)
    base = tiny("tiny-llama")
    with serving(base, clients_on(base)) as server, socket.socket() as connection:
        connection.settimeout(10)
        connection.connect(("127.0.0.1", server.port))
        for _ in range(3):
            time.sleep(0.6)
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                answer += connection.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET")
        assert connection.recv(65536) == b""


def test_an_answer_that_takes_long_is_not_taken_for_a_connection_that_asks_for_nothing(monkeypatch):
    monkeypatch.setattr(Connection, "seconds", 0.05)
    health = Api.health

    async def slowly(self, request):
        await asyncio.sleep(0.5)
        return await health(self, request)

    monkeypatch.setattr(Api, "health", slowly)
    base = tiny("tiny-llama")
    with serving(base, clients_on(base)) as server:
        assert httpx.get(f"http://127.0.0.1:{server.port}/health").status_code == 200


def test_unknown_paths_and_methods_answer_json(server):
    for method, path, status in [
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/health", 405),
    ]:
        found = httpx.request(method, f"http://127.0.0.1:{server.port}{path}")
        assert found.status_code == status and found.json()["error"]["message"]


# keys


@pytest.fixture(scope="module")
def locked():
    base = tiny("tiny-llama")
    with serving(base, clients_on(base), keys=Keys(KEYS)) as server:
        yield server


def test_a_key_opens_its_own_model_and_its_name_and_no_other(locked):
    client = locked.client(KEYS["run/bob"])
    assert [model.id for model in client.models.list()] == ["run/bob"]
    assert ask(client, "run/bob").choices[0].message.content
    for call in (lambda: ask(client, "run/ann"), lambda: client.models.retrieve("run/ann")):
        with pytest.raises(openai.NotFoundError) as refused:
            call()
        with pytest.raises(openai.NotFoundError) as unknown:
            client.models.retrieve("run/zed")
        # nothing tells a model of others from one that does not exist
        assert refused.value.message.replace("run/ann", "X") == unknown.value.message.replace(
            "run/zed", "X"
        )


@pytest.mark.parametrize(
    "key", ["wrong", "", " ", KEYS["run/bob"][:-1], KEYS["run/bob"] + "x", "ключ"]
)
def test_a_wrong_key_opens_nothing(locked, key):
    headers = {"Authorization": f"Bearer {key}".encode().decode("latin-1")}
    status, content = answer_to(raw_request(locked, b'{"model": "run/bob"}', **headers))
    assert status == 401 and content["error"]["code"] == "invalid_api_key"
    assert not any(name in content["error"]["message"] for name in NAMES)


def test_the_openai_package_says_that_a_key_is_wrong(locked):
    client = locked.client("wrong")
    for call in (lambda: ask(client), lambda: client.models.list()):
        with pytest.raises(openai.AuthenticationError):
            call()


def test_with_keys_the_server_may_be_reached_by_any_name(locked):
    headers = {"Host": "models.example", "Authorization": f"Bearer {KEYS['run/bob']}"}
    body = json.dumps({"model": "run/bob", "prompt": "x", "max_tokens": 1}).encode()
    assert answer_to(raw_request(locked, body, **headers))[0] == 200


def test_a_token_that_the_base_has_no_row_for_is_refused_and_harms_nobody_else():
    """As Gemma 3's <image_soft_token>, which its text models do not read."""
    base = tiny("tiny-llama")
    base.tokenizer.add_special_tokens({"pad_token": "<image>"})
    with serving(base, clients_on(base)) as server, server.client() as client:
        alone = client.completions.create(model="run/bob", prompt="hello", temperature=0)
        for prompt in ("an <image>", [5, 257]):
            with pytest.raises(openai.BadRequestError, match='prompt: holds "<image>"') as refused:
                client.completions.create(model="run/ann", prompt=prompt)
            assert refused.value.param == "prompt"
        picture = [{"role": "user", "content": "an <image>"}]
        with pytest.raises(openai.BadRequestError, match='messages: holds "<image>"'):
            client.chat.completions.create(model="run/ann", messages=picture)
        again = client.completions.create(model="run/bob", prompt="hello", temperature=0)
    assert again.choices[0].text == alone.choices[0].text


def test_ids_that_no_token_has_are_told_with_the_range(client):
    with pytest.raises(openai.BadRequestError, match="token ids from 0 to 256"):
        client.completions.create(model="run/ann", prompt=[257])
