"""The command line as a person uses it: what each command prints, on a terminal, in a pipe and with
--quiet.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import subprocess
import sys
import termios
import warnings
from pathlib import Path
from struct import pack

import pytest
from rich.console import Console as RichConsole

import comigs as package
from comigs.app import cli
from comigs.app.console import MANY, Console
from comigs.config import parse_config
from comigs.runs.folder import RunFolder
from comigs.runs.metrics import RoundEnd, Step, Train, Warned
from comigs.text import Table
from tests.fake_engine import train_of
from tests.runs import ENVIRONMENT, comigs, copied_run, finished, refused, write_config

COMMANDS = (
    "run",
    "resume",
    "evaluate",
    "report",
    "compare",
    "sweep",
    "generate",
    "prepare",
    "list",
)


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return write_config(tmp_path)


# help


def test_help_needs_no_torch():
    code = (
        "import sys; sys.argv = ['comigs', '--help']\n"
        "from comigs.app.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: code = end.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'matplotlib', 'safetensors'} "
        "& set(sys.modules)\n"
        "assert not heavy and code == 0, (heavy, code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert re.search(rf"│ {command} +[A-Z]", done.stdout)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_every_word_means(capsys, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    done = comigs(capsys, command, "--help")
    assert done.code == 0 and done.err == ""
    assert max(map(len, done.out.splitlines())) <= 80
    for parameter in cli.typer.main.get_command(cli.app).commands[command].params:
        assert parameter.help and parameter.help.split()[0] in done.out, parameter.name


def test_short_help_and_version(capsys):
    assert comigs(capsys, "-h").out == comigs(capsys, "--help").out
    assert comigs(capsys, "--version").out == f"comigs {package.__version__}\n"
    alone = comigs(capsys)
    assert "Commands" in alone.out and alone.err == ""


# run, resume


def test_run_in_a_pipe_is_plain_lines(config, capsys):
    done = comigs(capsys, "run", config)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[:5] == [
        "2 clients, method comigs, 2 rounds of 2 steps",
        "base tiny-gpt2: 11,728 parameters, float32, 1 CPU thread",
        lines[2],
        lines[3],
        "run folder runs/tiny",
    ]
    assert re.fullmatch(r"ann  tokens: train [\d,]+, valid [\d,]+, test [\d,]+", lines[2])
    rest = "\n".join(lines[5:])
    expected = [
        r"base       ann  valid perplexity [\d,]+, test perplexity [\d,]+",
        r"base       bob  valid perplexity [\d,]+, test perplexity [\d,]+",
        r"round 1/2  ann  train \d\.\d{3} nats/token",
        r"round 1/2  bob  train \d\.\d{3} nats/token",
        r"round 1/2  about \d+ s left",
        r"round 2/2  ann  train \d\.\d{3} nats/token, valid perplexity [\d,]+ after round 1",
        r"round 2/2  bob  train \d\.\d{3} nats/token, valid perplexity [\d,]+ after round 1",
        r" client .*",
    ]
    assert re.match(r"\n".join(expected[:-1]) + r"\n\s+(?s:.)*" + expected[-1], rest), rest
    assert lines[-2:] == [
        "report: runs/tiny/report.html",
        'next:   comigs generate runs/tiny --client ann --prompt "..."',
    ]
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in done.out
    assert Path("runs/tiny/report.html").stat().st_size > 10_000


def test_quiet_is_the_table_and_the_report(config, capsys):
    done = comigs(capsys, "run", config, "--quiet", "--out", "here")
    lines = done.out.strip().splitlines()
    assert "client" in lines[1] and "perplexity" in lines[1]
    assert lines[-1] == "report: here/report.html"
    assert len(lines) == 9
    assert not re.search("round 1|base tiny|tokens:|next:", done.out)
    again = comigs(capsys, "resume", "here", "-q")
    assert again.out == done.out


def test_short_options_are_overrides(config, capsys):
    assert (
        comigs(
            capsys, "run", config, "-q", "--method", "local", "--seed", "5", "--set", "rounds=1"
        ).code
        == 0
    )
    written = RunFolder.open(Path("runs/tiny")).config()
    assert (written.method, written.seed, written.rounds) == ("local", 5, 1)
    comigs(capsys, "run", config, "-q", "--set", "rounds=1")
    assert sorted(os.listdir("runs")) == ["tiny", "tiny-2"]


def on_a_terminal(words):
    """What `comigs WORDS` writes to a terminal of 80 columns, in a forked child: importing torch
    again takes long.
    """
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # of forking with threads: nobody holds a lock here
        child, screen = pty.fork()
    if child == 0:
        try:
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            sys.argv = ["comigs", *words]
            fcntl.ioctl(1, termios.TIOCSWINSZ, pack("HHHH", 40, 80, 0, 0))
            os.environ["TERM"] = "xterm-256color"
            for name in ("COLUMNS", "NO_COLOR"):
                os.environ.pop(name, None)
            cli.main()
        except SystemExit as end:
            sys.stdout.flush()
            os._exit(end.code)
        finally:
            os._exit(70)
    raw = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while piece := os.read(screen, 1 << 16):
            raw += piece
    os.close(screen)
    assert os.waitpid(child, 0)[1] == 0, raw
    return raw.decode()


def test_run_on_a_terminal_shows_progress_and_leaves_plain_lines(config):
    raw = on_a_terminal(["run", str(config), "--set", "client.steps=60"])
    assert "\x1b[?25h" in raw  # the cursor is back
    live = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", part) for part in re.split(r"[\r\n]+", raw)]
    assert max(map(len, live)) <= 80
    bars = [line for line in live if "%" in line and "round " in line]
    assert any(
        re.match(
            r"round \d/2  (ann|bob)  experts \d\.\d{3} nats/token [━╸╺ ]+ +\d+% about \d+ s left", b
        )
        for b in bars
    )
    assert any("starting" in line for line in live)
    assert "Traceback" not in raw and "Warning" not in raw and "[transformers]" not in raw
    assert live[-2].startswith("next:") or live[-1].startswith("next:")


# the console by itself


class Screen(Console):
    """A console that writes into `text`, 80 columns wide."""

    def __init__(self, clients, rounds=3, terminal=False):
        names = [{"name": name, "text": "x"} for name in clients]
        super().__init__(parse_config({"clients": names, "rounds": rounds, "client": {"steps": 2}}))
        self.file = io.StringIO()
        self.out = RichConsole(file=self.file, width=80, force_terminal=terminal, highlight=False)

    @property
    def text(self):
        return self.file.getvalue()


def a_round(screen, number, clients, trained=True):
    for client in clients:
        for step in (1, 2):
            screen.report(
                Step(round=number, client=client, step=step, level="experts", nats_per_token=2.0)
            )
    for client in clients:
        screen.report(trained_line(number, client, 2.0 if trained else None))
    screen.report(RoundEnd(round=number))


def trained_line(number, client, nats):
    moved = {"uploaded_bytes": 0, "downloaded_bytes": 0}
    return Train(**train_of(number, client) | moved | {"train_nats_per_token": nats})


def test_many_clients_are_one_line_a_round():
    clients = [f"c{n}" for n in range(MANY + 1)]
    screen = Screen(clients)
    with screen:
        a_round(screen, 1, clients)
    assert f"round 1/3  {MANY + 1} clients' mean  train 2.000 nats/token\n" in screen.text
    assert screen.text.count("round 1/3") == 2  # and the time left


def test_a_round_in_which_nothing_was_trained():
    screen = Screen(["ann"])
    a_round(screen, 1, ["ann"], trained=False)
    assert "round 1/3  ann  nothing trained\n" in screen.text


def test_a_private_device_that_says_nothing_of_its_loss_has_trained():
    screen = Screen(["ann"])
    line = trained_line(1, "ann", None).model_copy(update={"epsilon": 2.9})
    screen.report(line)
    screen.report(RoundEnd(round=1))
    assert "round 1/3  ann  trained, epsilon 2.9; its figures stay with it\n" in screen.text


def test_warnings_are_whole_lines():
    screen = Screen(["ann"])
    message = "one expert takes over 97% of the weight " * 5
    screen.report(Warned(round=1, client="ann", sign="collapsed-router", message=message))
    screen.report(Warned(round=1, client=None, sign="drifting-generalists", message="m"))
    assert (
        screen.text
        == f"warning: collapsed-router: client ann: {message}\nwarning: drifting-generalists: m\n"
    )


def test_long_names_fit_a_terminal():
    clients = ["a" * 64, "bob"]
    screen = Screen(clients, terminal=True)
    with screen:
        a_round(screen, 1, clients)
        screen.progress.refresh()
    rows = (("a" * 64, "1,548", "744", "51.9 %"), ("bob", "1,205", "584", "51.6 %"))
    screen.table(
        Table(
            ("client", "base perplexity", "personal perplexity", "gain"),
            rows,
            ("mean", "1", "2", "3"),
        )
    )
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.text)
    shown = [line for part in plain.split("\n") for line in part.split("\r") if "train" not in line]
    assert max(map(len, shown)) <= 80
    assert "51.9 %" in plain


def test_time_left_counts_from_where_a_resumed_run_began(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("comigs.app.console.time.monotonic", lambda: now[0])
    screen = Screen(["ann"], rounds=9)
    screen.report(Step(round=6, client="ann", step=1, level="experts", nats_per_token=1.0))
    now[0] += 30
    screen.report(trained_line(6, "ann", 1.0))
    screen.report(RoundEnd(round=6))
    assert (
        "round 6/9  about 2 min left\n" in screen.text
    )  # 30 s a round: three more, and the last exchange


# evaluate, generate, prepare, list, report


def test_evaluate_is_the_summary_again(capsys):
    run = finished() / "run"
    summary = json.loads((run / "summary.json").read_text())["clients"]
    results = json.loads(comigs(capsys, "evaluate", run, "--json").out)
    assert results.keys() == summary.keys()
    for name, result in results.items():
        for which, recorded in (("personal", "test"), ("base", "base_test")):
            for figure, value in summary[name][recorded].items():
                assert result[which][figure] == pytest.approx(value, rel=1e-6), (
                    name,
                    which,
                    figure,
                )


def test_evaluate_for_people_and_of_one_client(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    done = comigs(capsys, "evaluate", finished() / "run", "--split", "valid", "--client", "bob")
    assert (done.code, done.err) == (0, "")
    assert re.search(r"^ bob +[\d.]+ +[\d.]+ +[\d.]+ +\d+ *$", done.out, re.MULTILINE)
    assert "ann" not in done.out and "base valid" in done.out
    assert max(map(len, done.out.splitlines())) <= 80


def test_generate_is_repeatable_and_streams(capsys):
    run = finished() / "run"

    def write(*words):
        done = comigs(
            capsys,
            "generate",
            run,
            "--client",
            "ann",
            "--prompt",
            "the cat ",
            "--max-new-tokens",
            "12",
            *words,
        )
        assert (done.code, done.err) == (0, "")
        assert done.out.startswith("the cat ") and done.out.endswith("\n")
        return done.out

    assert write() == write()
    hot = ("--temperature", "1.5", "--seed")
    assert write(*hot, "1") == write(*hot, "1")
    assert len({write(*hot, str(seed)) for seed in range(4)}) > 1


def test_a_model_made_on_a_gpu_is_read_where_there_is_none(tmp_path, capsys):
    run, words = (
        copied_run(tmp_path),
        ["--client", "ann", "--prompt", "the cat", "--max-new-tokens", 4],
    )
    here = comigs(capsys, "generate", run, *words)
    config = run / "config.toml"
    config.write_text(config.read_text().replace('device = "cpu"', 'device = "cuda:97"'))
    there = comigs(capsys, "generate", run, *words)
    assert (there.code, there.out) == (0, here.out)


def test_prepare_lists_every_split_and_trains_nothing(config, capsys):
    done = comigs(capsys, "prepare", config)
    lines = done.out.splitlines()
    assert [line.split(": ")[:2] for line in lines] == [
        [c, s] for c in ("ann", "bob") for s in ("train", "valid", "test")
    ]
    assert all(line.endswith("(tokenised)") for line in lines)
    assert all(
        line.endswith("(in the cache)")
        for line in comigs(capsys, "prepare", config).out.splitlines()
    )
    assert not Path("runs").exists()


def test_list_names_everything(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    done = comigs(capsys, "list")
    assert (done.code, done.err) == (0, "")
    for name in (
        "comigs",
        "fedavg",
        "local",
        "mini",
        "smollm2-135m",
        "FOLDER or ORG/MODEL",
        "debian-faq:LANGUAGE",
    ):
        assert name in done.out
    assert "Raises" not in done.out
    assert max(map(len, done.out.splitlines())) <= 80


def test_report_of_several_runs(tmp_path, capsys):
    one = copied_run(tmp_path)
    two = one.rename(tmp_path / "one")
    one = copied_run(tmp_path)
    done = comigs(capsys, "report", one, two)
    assert done.out.splitlines() == [str(one / "report.html"), str(two / "report.html")]
    assert refused(capsys, "report", one, two, "--out", tmp_path / "both.html").endswith(
        "comigs compare RUN..."
    )


def test_output_that_cannot_show_a_letter(tmp_path):
    environment = ENVIRONMENT | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-m", "comigs", "run", "--help"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert "comigs run" in done.stdout
