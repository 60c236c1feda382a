"""`comigs chat` as a person meets it: a pipe, a terminal with Ctrl-C, and what is refused."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from contextlib import closing
from types import SimpleNamespace

import pytest

from comigs import load_config
from comigs.app import api
from comigs.personal.talk import handle
from comigs.text import harmless
from tests.conftest import tiny
from tests.runs import ENVIRONMENT, comigs, finished, refused, write_config

WHOLE = "options.finish=mixture"  # so that there are routes


def test_lines_from_a_pipe_are_answered_one_by_one(capsys, monkeypatch, tmp_path):
    given = [f'data.cache="{tmp_path / "cache"}"', WHOLE]
    run = api.run(load_config(write_config(tmp_path), given), tmp_path / "run").path
    lines = ["the cat", "/routes", "/client bob", "the cat", "/nothing", "/client zed", "/save", ""]
    file = tmp_path / "said.json"
    monkeypatch.setattr(
        "sys.stdin", io.StringIO("\n".join([*lines, f"/save {file}", "/help", "/quit", "x"]))
    )
    done = comigs(capsys, "chat", run, "--client", "ann", "--max-new-tokens", 5)
    assert done.code == 0
    with closing(api.open_personal_model(run, "ann")) as model:
        answer = model.generate("the cat", max_new_tokens=5)[len("the cat") :]
        assert done.out.startswith(harmless(answer) + "\n")
    assert re.search(r"\[[01]\.\d\d\]", done.out)
    assert "(weight of what all know: mean 0." in done.out and "no token to" not in done.out
    assert "(bob; clients of this run: ann, bob)" in done.out and "/system TEXT" in done.out
    nothing, zed, save = done.err.splitlines()
    assert nothing.startswith("error: /nothing: no such command; there are: /reset, /system")
    assert '"zed"' in zed and save == "error: /save: name a file"
    assert len(json.loads(file.read_text(encoding="utf-8"))["messages"]) == 4


def test_a_line_that_is_no_utf_8_is_said_and_the_next_one_is_read(capsys, monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n/nothing\n/quit\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", stdin)
    done = comigs(capsys, "chat", finished() / "run", "--client", "ann")
    first, second = done.err.splitlines()
    assert done.code == 0 and first.startswith("error: this line: not valid UTF-8")
    assert second.startswith("error: /nothing")


def test_where_the_router_is_closed_that_is_said_beside_the_weights(capsys):
    closed = SimpleNamespace(
        routes=lambda: [("the", 0.0), (" cat", 0.0)], sides=("what all know", "its own")
    )
    handle(closed, "/routes")
    out = capsys.readouterr().out
    assert "(weight of what all know: mean 0.00;" in out
    assert out.endswith("; no token to what all know)\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--client", "zed"), '"zed"'),
        (("--client", "ann", "--temperature", "nan"), "temperature"),
        (("--client", "ann", "--system", "caf\udce9"), "--system: not valid UTF-8"),
        (("--client", "ann", "--max-new-tokens", "0"), "max-new-tokens"),
    ],
)
def test_what_is_wrong_is_one_line(capsys, words, said):
    assert said in refused(capsys, "chat", finished() / "run", *words)


def test_a_run_without_a_round_has_nobody_to_talk_to(capsys, tmp_path):
    assert "no such run folder" in refused(capsys, "chat", tmp_path / "none", "--client", "ann")


class Terminal:
    """`comigs chat` on a terminal of its own."""

    def __init__(self, *words):
        self.main, side = pty.openpty()
        program = "from comigs.app.cli import main; main()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, words)],
            stdin=side,
            stdout=side,
            stderr=side,
            env={**ENVIRONMENT, "TERM": "dumb"},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # whose Ctrl-C is ours
        )
        os.close(side)
        self.shown = ""

    def wait_for(self, text, seconds=40):
        """Read until the text is shown; it is used up."""
        before = self.read_until(text, seconds)
        assert before is not None, f"{text!r} was not shown: {self.shown!r}"
        return before

    def read_until(self, text, seconds):
        """What was shown before the text, which is used up; None if it does not come in time."""
        until = time.monotonic() + seconds
        while text not in self.shown:
            if time.monotonic() > until:
                return None
            if select.select([self.main], [], [], 0.1)[0]:
                self.shown += os.read(self.main, 65536).decode(errors="replace")
        before, _, self.shown = self.shown.partition(text)
        return before

    def wait_for_more(self):
        """Read until anything at all is shown."""
        while not self.shown:
            if select.select([self.main], [], [], 40)[0]:
                self.shown += os.read(self.main, 65536).decode(errors="replace")

    def type(self, text):
        os.write(self.main, text.encode())

    def interrupt(self, shown):
        """Press Ctrl-C until the text is shown, as a person does. Python's line editor sleeps
        through one that comes between its prompt and its wait for keys; the next one wakes it."""
        for _ in range(20):
            self.type("\x03")
            if (before := self.read_until(shown, seconds=2)) is not None:
                return before
        raise AssertionError(f"{shown!r} was not shown: {self.shown!r}")


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """A run on a base that reads 16,384 tokens: an answer takes long enough to be stopped."""
    folder = tmp_path_factory.mktemp("long")
    base = tiny("tiny-llama")
    base.model.config.max_position_embeddings = 16384
    base.model.save_pretrained(folder / "base")
    base.tokenizer.save_pretrained(folder / "base")
    given = [f'base.name="{folder / "base"}"', f'data.cache="{folder / "cache"}"', WHOLE]
    api.run(load_config(write_config(folder, rounds=1), given), folder / "run")
    return folder / "run"


def test_ctrl_c_stops_an_answer_and_not_the_program_which_sigterm_does(long_run):
    terminal = Terminal("chat", long_run, "--client", "ann", "--max-new-tokens", 8000)
    try:
        terminal.wait_for("run/ann> ")
        terminal.interrupt("(Ctrl-D ends)")  # while nothing is written
        terminal.wait_for("run/ann> ")
        for question in ("the cat", "sat"):
            terminal.type(f"{question}\n")
            terminal.wait_for(f"{question}\r\n")
            terminal.wait_for_more()
            terminal.type("\x03")
            answer = terminal.wait_for("(stopped)", seconds=10)
            assert 0 < len(answer) < 8000
            terminal.wait_for("run/ann> ")
        terminal.type("/routes\n")
        terminal.wait_for("weight of what all know")
        terminal.wait_for("run/ann> ")
        # Python's line editor sleeps through this signal, too, at that moment.
        for _ in range(8):
            terminal.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                terminal.process.wait(5)
        assert terminal.process.returncode in (128 + signal.SIGTERM, -signal.SIGTERM)
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.main)
