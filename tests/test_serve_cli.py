"""`comigs serve` as a command: what it refuses, what it offers, and how it ends."""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, closing, contextmanager

import openai
import pytest

from comigs import load_config
from comigs.app import api
from comigs.errors import UserError
from comigs.personal.serve.catalogue import names_of
from comigs.personal.serve.keys import Keys, is_loopback
from comigs.personal.serve.server import listen
from tests.runs import ENVIRONMENT, copied_run, finished, refused, write_config

KEY = "a-key-that-is-long-enough-"


@pytest.fixture
def run():
    return finished() / "run"


def keys_file(folder, content, mode=0o600):
    path = folder / "keys.toml"
    path.write_text(content, encoding="utf-8")
    path.chmod(mode)
    return path


def both(first=KEY + "1", second=KEY + "2"):
    return f'"run/ann" = "{first}"\n"run/bob" = "{second}"\n'


# what is refused, before the base is loaded


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--host", "0.0.0.0"), "--host 0.0.0.0: others can reach it, so every model needs a key"),
        (("--host", "::"), "others can reach it"),
        (("--host", "192.0.2.1"), "others can reach it"),
        (("--dtype", "float16"), '--dtype: given "float16"; must be float32 or bfloat16'),
        (("--port", "70000"), "--port"),
        (("--rows", "0"), "--rows"),
        (("--queue", "0"), "--queue"),
        (("--context", "1"), "--context"),
        (("--seconds", "nan"), "--seconds"),
        (("--keys", "none.toml"), "none.toml: no such keys file"),
    ],
)
def test_what_is_wrong_is_one_line(capsys, run, words, said):
    assert said in refused(capsys, "serve", run, *words)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[", "cannot be read"),
        ('"run/ann" = "' + KEY + '1"', "no key for run/bob; every model that is served needs one"),
        (both() + '"run/bop" = "x"', '"run/bop" is not served. Did you mean "run/bob"?'),
        (both(second="short"), 'the key of "run/bob" must be a text of 20 characters or more'),
        (both(second=KEY + "1"), "two models have the same key"),
        ('"run/ann" = 5', 'the key of "run/ann" must be a text'),
        (both(second="ü" * 20), 'the key of "run/bob" must be of letters, digits and signs of'),
        (both(second=KEY + " "), "without a blank at either end"),
    ],
)
def test_a_file_of_keys_that_does_not_fit(capsys, run, tmp_path, content, said):
    path = keys_file(tmp_path, content)
    assert said in refused(capsys, "serve", run, "--host", "0.0.0.0", "--keys", path)


def test_a_file_of_keys_that_others_can_read(capsys, run, tmp_path):
    path = keys_file(tmp_path, both(), mode=0o644)
    line = refused(capsys, "serve", run, "--keys", path)
    assert f"close it with: chmod 600 {path}" in line and KEY not in line


def test_a_port_that_is_taken(capsys, run):
    with closing(socket.socket()) as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        line = refused(capsys, "serve", run, "--port", port)
    assert line.startswith(f"error: port {port} of 127.0.0.1: Address already in use")


def test_a_port_that_another_server_has_taken_and_does_not_use_yet():
    """Both were bound, and the second ended in a traceback once its models were loaded."""
    with closing(listen("127.0.0.1", 0)) as first:
        port = first.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} of 127.0.0.1: Address already in use"):
            listen("127.0.0.1", port)
        assert first.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


@pytest.mark.parametrize("host", ["a..b", "x" * 64])
def test_a_host_that_can_be_no_name(host):
    with pytest.raises(UserError, match=f"port 80 of {host}: .*; choose another with --port"):
        listen(host, 80)


def test_a_run_that_is_none_or_has_no_round_or_is_given_twice(capsys, run, tmp_path):
    assert "no such run folder" in refused(capsys, "serve", run, tmp_path / "none")
    assert "a run is given twice" in refused(capsys, "serve", run, run)
    config = load_config(write_config(tmp_path))

    def stop(event):
        if event.kind == "step":
            raise KeyboardInterrupt

    with pytest.raises(UserError, match="every whole round is kept"):
        api.run(config, tmp_path / "begun", report=stop)
    assert "no round is finished yet" in refused(capsys, "serve", tmp_path / "begun")


def test_runs_on_different_bases(capsys, run, tmp_path):
    given = ['base.name="tiny-llama"', f'data.cache="{tmp_path / "cache"}"']
    api.run(load_config(write_config(tmp_path, rounds=1), given), tmp_path / "other")
    line = refused(capsys, "serve", run, tmp_path / "other")
    assert "trained on another base than" in line and "serve them apart" in line


def test_a_run_whose_base_has_changed(capsys, tmp_path):
    folder = copied_run(tmp_path)
    text = (folder / "env.json").read_text()
    changed = re.sub(r'"base_fingerprint": "\w+"', '"base_fingerprint": "0"', text)
    assert changed != text
    (folder / "env.json").write_text(changed)
    assert "is not the one this run began with" in refused(capsys, "serve", folder)


def test_a_run_that_holds_no_model(capsys, tmp_path):
    folder = copied_run(tmp_path)
    text = (folder / "checkpoint.json").read_text()
    (folder / "checkpoint.json").write_text(re.sub(r'"clients/[^"]+": "\w+",?', "", text))
    assert "holds no client's model" in refused(capsys, "serve", folder)


def test_tensors_that_are_damaged(capsys, tmp_path):
    folder = copied_run(tmp_path)
    file = folder / "clients" / "ann" / "personal.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert "damaged" in refused(capsys, "serve", folder)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/run"], ["run"]),
        (["a/run", "b/other"], ["run", "other"]),
        (["a/run", "b/run"], ["a/run", "b/run"]),
        (["a/x/run", "b/x/run", "c"], ["a/x/run", "b/x/run", None]),
    ],
)
def test_runs_are_told_apart_by_the_shortest_ends_of_their_paths(tmp_path, paths, names):
    found = names_of([tmp_path / path for path in paths])
    for name, expected in zip(found, names, strict=True):
        assert name == expected or (expected is None and name.endswith("/c"))


@pytest.mark.parametrize(
    ("host", "ours"),
    [
        ("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True),
        ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("example.org", False), ("", False),
    ],
)  # fmt: skip
def test_what_only_this_machine_can_reach(host, ours):
    assert is_loopback(host) == ours


def test_each_key_is_compared_with_all_of_them(monkeypatch):
    """However early a key is found, and however much of it is right, as many comparisons are
    made.
    """
    from comigs.personal.serve import keys as module

    compared = []
    same = module.hmac.compare_digest
    monkeypatch.setattr(
        module.hmac, "compare_digest", lambda a, b: compared.append((len(a), len(b))) or same(a, b)
    )
    keys = Keys({f"run/{n}": f"{KEY}{n}" for n in range(5)})
    for given, opened in [(KEY + "0", "run/0"), (KEY + "4", "run/4"), (KEY, None), ("", None)]:
        compared.clear()
        assert keys.opens(given) == opened
        assert compared == [(32, 32)] * 5


# a process of its own


@contextmanager
def served(*words):
    """`comigs serve WORDS...`, its address, and the process."""
    command = [sys.executable, "-m", "comigs", "serve", *map(str, words), "--port", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    shown = ""
    try:
        until = time.monotonic() + 60
        while not (found := re.search(r"at (http://\S+/v1);", shown)):
            if time.monotonic() >= until or process.poll() is not None:
                process.kill()  # or its errors would be waited for without end
                raise AssertionError((shown, process.stderr.read()))
            if select.select([process.stdout], [], [], 0.2)[0]:
                shown += os.read(process.stdout.fileno(), 65536).decode()
        yield found[1], process, shown
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def test_two_runs_behind_keys_until_sigterm(run, tmp_path):
    """As an operator uses it: two runs, a key each, a running answer when it is told to stop."""
    again = shutil.copytree(run, tmp_path / "again")
    content = both() + both(KEY + "3", KEY + "4").replace("run/", "again/")
    path = keys_file(tmp_path, content)
    with served(run, again, "--keys", path) as (address, process, shown):
        for name in ("run/ann", "run/bob", "again/ann", "again/bob"):
            assert f"  {name}\n" in shown
        assert "4 models on tiny-gpt2 in float32" in shown

        with ExitStack() as stack:

            def client(key):
                made = openai.OpenAI(base_url=address, api_key=key, max_retries=0)
                return stack.enter_context(made)

            first, copy = client(KEY + "1"), client(KEY + "3")
            settings = {"prompt": "the cat", "max_tokens": 20, "temperature": 0}
            text = first.completions.create(model="run/ann", **settings).choices[0].text
            copied = copy.completions.create(model="again/ann", **settings)
            assert copied.choices[0].text == text
            with closing(api.open_personal_model(run, "ann")) as model:
                assert model.generate("the cat", max_new_tokens=20) == "the cat" + text
            with pytest.raises(openai.NotFoundError):
                first.completions.create(model="again/ann", **settings)
            with pytest.raises(openai.AuthenticationError):
                client("wrong").models.list()

            stream = first.completions.create(model="run/ann", **settings, stream=True)
            next(iter(stream))
            process.send_signal(signal.SIGTERM)
            assert "".join(chunk.choices[0].text for chunk in stream)  # it ended, in order
        assert process.wait(30) == 0
        assert process.stdout.read() == "stopped\n" and process.stderr.read() == ""


@pytest.mark.slow  # processes that each import all of transformers
def test_in_bfloat16_and_until_ctrl_c(run):
    with served(run, "--dtype", "bfloat16") as (address, process, shown):
        assert "2 models on tiny-gpt2 in bfloat16" in shown
        with openai.OpenAI(base_url=address, api_key="none") as client:
            answer = client.completions.create(model="run/ann", prompt="the cat", max_tokens=5)
            assert answer.choices[0].text
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
