"""Many at once, some of whom leave, do not read, or take too long."""

from __future__ import annotations

import json
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from comigs.personal.serve.answers import Bounds
from comigs.personal.serve.scheduler import Limits
from tests.conftest import tiny, until
from tests.serving import HELLO, NAMES, ask, clients_on, raw_request, serving, word_base


@pytest.fixture(scope="module")
def server():
    base = tiny("tiny-llama")
    with serving(base, clients_on(base)) as server:
        yield server


def test_200_requests_at_once_are_all_answered_as_alone(server):
    alone = {name: ask(server.client(), name).choices[0].message.content for name in NAMES}
    client = server.client(timeout=60)
    before = server.scheduler.passes
    with ThreadPoolExecutor(200) as threads:
        answers = list(threads.map(lambda n: (NAMES[n % 4], ask(client, NAMES[n % 4])), range(200)))
    assert all(a.choices[0].message.content == alone[name] for name, a in answers)
    assert (
        server.scheduler.passes - before < 200 * 8 / 4
    )  # far fewer passes than tokens: they shared them
    assert server.idle()


def test_too_many_are_told_to_come_back():
    base = word_base(window=4096)
    with serving(base, clients_on(base), Limits(rows=1, queue=1), Bounds(4096)) as server:
        first = ask(server.client(), stream=True, max_tokens=4000)
        next(iter(first))
        queued = threading.Thread(target=lambda: ask(server.client(), max_tokens=1))
        queued.start()
        until(lambda: server.scheduler.load() == (1, 1))
        with pytest.raises(openai.RateLimitError) as refused:
            ask(server.client())
        assert refused.value.code == "queue_full"
        # who asks again by itself, as openai's client does, is served in the end
        patient = server.client(max_retries=10)
        first.close()
        assert ask(patient).choices[0].message.content
        queued.join(10)
        assert not queued.is_alive()


def test_who_goes_away_frees_the_row():
    base = word_base(window=4096)
    with serving(base, clients_on(base), Limits(rows=2), Bounds(4096)) as server:
        stream = ask(server.client(), stream=True, max_tokens=4000)
        next(iter(stream))
        body = json.dumps(
            {"model": "run/bob", "prompt": [1, 2], "max_tokens": 4000, "temperature": 0}
        ).encode()
        whole = raw_request(server, body)  # waits for its answer
        until(lambda: server.scheduler.load() == (2, 0))
        stream.close()
        whole.close()
        assert server.idle(2)
        assert server.scheduler.passes < 3000  # or they were written to the end


@pytest.mark.slow  # it waits
def test_a_slow_reader_holds_up_nobody_and_is_left_in_the_end():
    """It reads nothing of an answer of some megabytes, which no buffer of the system takes up."""
    base = word_base(window=4096)
    bounds = Bounds(4096, seconds=4)
    with serving(base, clients_on(base), Limits(rows=4), bounds) as server:
        body = json.dumps(
            {"model": "run/ann", "messages": HELLO, "stream": True, "n": 3, "logprobs": True,
             "top_logprobs": 20, "max_tokens": 500, "temperature": 0}
        ).encode()  # fmt: skip
        asked = time.monotonic()
        slow = raw_request(server, body, "/v1/chat/completions")
        while not server.scheduler.load()[0]:
            time.sleep(0.01)
        seconds = []
        for _ in range(5):
            began = time.monotonic()
            assert ask(server.client(), "run/bob").usage.completion_tokens == 8
            seconds.append(time.monotonic() - began)
        assert statistics.median(seconds) < 2
        assert server.idle(10)  # its own rows are free, read or not
        time.sleep(max(0, asked + 7 - time.monotonic()))  # two seconds past its last moment
        raw = b""
        slow.settimeout(5)
        try:
            while piece := slow.recv(65536):
                raw += piece
        except ConnectionError:
            pass
        slow.close()
        assert raw and not raw.endswith(b"0\r\n\r\n")  # the server did not wait for its end
        assert ask(server.client(), "run/bob").usage.completion_tokens == 8


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long_is_ended(stream):
    base = word_base(window=4096)
    with serving(base, clients_on(base), bounds=Bounds(4096, seconds=0.3)) as server:
        client = server.client(max_retries=2)
        began = time.monotonic()
        with pytest.raises(openai.APIError, match="longer than this server allows") as failed:
            list(ask(client, stream=stream, max_tokens=4000))
        assert 0.3 <= time.monotonic() - began < 2  # and it is not asked for again
        assert stream or failed.value.code == "timeout"
        assert server.idle()


def test_shutting_down_lets_short_answers_end_and_ends_long_ones():
    base = word_base(window=32768)
    with serving(base, clients_on(base), bounds=Bounds(32768), grace=3) as server:
        long = ask(server.client(), stream=True, max_tokens=32000)
        short = ask(server.client(), stream=True, max_tokens=50)
        next(iter(long)), next(iter(short))
        began = time.monotonic()
        server.server.should_exit = True
        assert [c.choices[0].finish_reason for c in short][-1] == "length"
        with pytest.raises(openai.APIError, match="shutting down"):
            list(long)
        server.thread.join(10)
        assert not server.thread.is_alive() and 3 <= time.monotonic() - began < 8
        with pytest.raises(openai.APIConnectionError):
            ask(server.client())
