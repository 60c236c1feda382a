"""Killed at any moment, resumed, and the result is that of a run nobody touched, to the bit (on the
CPU).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from unittest.mock import patch

import pytest

from comigs import load_config
from comigs.app import api, cli
from comigs.client.client import Client
from comigs.runs.folder import RunFolder
from tests.kills import begin, in_child, kill_self, killed_at
from tests.runs import comigs, files, finished, outcome, start, write_config

KEPT = "metrics.jsonl"


def settings(cache="cache"):
    return load_config(finished() / "tiny.toml", [f'data.cache="{finished() / cache}"'])


def test_two_runs_are_equal_to_the_bit(tmp_path):
    api.run(settings(), tmp_path / "again")
    assert outcome(tmp_path / "again") == outcome(finished() / "run")


def resume_and_compare(path):
    """As a person would go on: resume where there is a run, else run."""
    if path.exists():
        api.resume(path)
    else:
        api.run(settings(), path)
    assert outcome(path) == outcome(finished() / "run")


@pytest.mark.parametrize("steps", [1, 3, 5, 6, 8])
@pytest.mark.few(3)
def test_killed_while_training(tmp_path, steps):
    seen = 0

    def kill(event):
        nonlocal seen
        seen += event.kind == "step"
        if seen == steps:
            kill_self()

    assert in_child(lambda: api.run(settings(), tmp_path / "run", report=kill)) == signal.SIGKILL
    assert (tmp_path / "run" / KEPT).exists()
    resume_and_compare(tmp_path / "run")


@pytest.mark.parametrize("evaluation", [1, 5, 7, 9, 12])
@pytest.mark.few(2)
def test_killed_while_measuring(tmp_path, evaluation):
    seen, measure = 0, Client.evaluate

    def evaluate(*arguments, **settings):
        nonlocal seen
        seen += 1
        if seen == evaluation:
            kill_self()
        return measure(*arguments, **settings)

    def harmed():
        with patch.object(Client, "evaluate", evaluate):
            api.run(
                load_config(finished() / "tiny.toml", [f'data.cache="{tmp_path}"']),
                tmp_path / "run",
            )

    measured = len([x for x in RunFolder(finished() / "run").metrics() if x.kind == "evaluation"])
    assert evaluation <= measured
    assert in_child(harmed) == signal.SIGKILL
    resume_and_compare(tmp_path / "run")


def kill_at_touches(tmp_path, touches):
    for touch in touches:
        path = tmp_path / f"{touch:03d}" / "run"
        if not killed_at(touch, path, lambda: api.run(settings(), path)):  # noqa: B023
            return touch
        resume_and_compare(path)
    return None


@pytest.mark.parametrize("first", range(1, 230, 29))  # a run touches its folder about 230 times
@pytest.mark.few(4)
def test_killed_while_writing(tmp_path, first):
    assert kill_at_touches(tmp_path, [first]) is None


@pytest.mark.slow
def test_killed_at_every_touch_of_the_folder(tmp_path):
    assert kill_at_touches(tmp_path, range(1, 1000)) > 150


def test_killed_again_and_again(tmp_path):
    path = tmp_path / "run"
    assert killed_at(35, path, lambda: api.run(settings(), path))
    for touch in (20, 30, 40, 40, 20):
        assert killed_at(touch, path, lambda: api.resume(path))
    api.resume(path)
    assert outcome(path) == outcome(finished() / "run")


def test_resuming_says_where_it_goes_on(tmp_path, capsys):
    path = tmp_path / "run"

    def kill(event):
        if event.kind == "server":
            kill_self()

    assert in_child(lambda: api.run(settings(), path, report=kill)) == signal.SIGKILL
    done = comigs(capsys, "resume", path)
    assert done.code == 0
    assert "going on after round 1 of 2" in done.out
    assert "round 2/2" in done.out and "round 1/2" not in done.out


def test_timings_of_a_round_that_was_lost_are_dropped(tmp_path):
    path = tmp_path / "run"
    killed = killed_at(45, path, lambda: api.run(settings(), path))
    api.resume(path)
    timings = [json.loads(line) for line in (path / "timings.jsonl").read_text().splitlines()]
    assert killed and [(t["round"], t["client"]) for t in timings] == [
        (r, c) for r in (1, 2, 3) for c in ("ann", "bob")
    ]


def stop_after_round(number, run, child, sign, still_runs):
    """Send the process a signal as soon as its run has committed that round."""
    checkpoint, until = run / "checkpoint.json", time.monotonic() + 120
    while not (checkpoint.exists() and json.loads(checkpoint.read_text())["round"] >= number):
        assert still_runs() and time.monotonic() < until, "no such round"
        time.sleep(0.005)
    os.kill(child, sign)


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_the_command_stopped_from_outside(tmp_path, capsys, sign):
    run, error = tmp_path / "run", tmp_path / "error"

    def command():
        os.dup2(os.open(error, os.O_WRONLY | os.O_CREAT), 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        sys.argv = [
            "comigs",
            "run",
            str(finished() / "tiny.toml"),
            "--out",
            str(run),
            "--set",
            "rounds=50",
            "--set",
            f'data.cache="{finished() / "cache"}"',
        ]
        try:
            cli.main()
        except SystemExit as end:
            sys.stderr.flush()
            os._exit(end.code)

    child = begin(command)
    stop_after_round(2, run, child, sign, lambda: os.waitpid(child, os.WNOHANG) == (0, 0))
    _, status = os.waitpid(child, 0)
    if sign == signal.SIGKILL:
        assert os.WTERMSIG(status) == sign
    else:
        assert os.WEXITSTATUS(status) == 130
        assert (
            error.read_text()
            == f"stopped: every whole round is kept; go on with: comigs resume {run}\n"
        )
    folder = RunFolder.open(run)
    assert 2 <= folder.rewind().round < 50
    whole = RunFolder.open(finished() / "run").metrics()
    assert folder.metrics()[0] == whole[0]  # the base; the rest has another schedule


@pytest.mark.slow
def test_the_real_command_killed_interrupted_and_resumed(tmp_path, capsys):
    config, run = write_config(tmp_path, rounds=8), tmp_path / "run"
    cache = f'data.cache="{tmp_path / "cache"}"'
    process = start("run", config, "--set", cache, "--out", run, cwd=tmp_path)
    stop_after_round(2, run, process.pid, signal.SIGKILL, lambda: process.poll() is None)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    process = start("resume", run, cwd=tmp_path)
    stop_after_round(4, run, process.pid, signal.SIGINT, lambda: process.poll() is None)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == f"stopped: every whole round is kept; go on with: comigs resume {run}\n"
    assert not (run / "summary.json").exists()
    assert comigs(capsys, "resume", run).code == 0
    assert outcome(run) == outcome(api.run(load_config(config, [cache]), tmp_path / "whole").path)


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_in_any_phase_is_one_line_and_130(tmp_path, capsys, monkeypatch, sign):
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path)
    for phase, said in {
        "comigs.app.setup.load_base": "stopped\n",
        "comigs.app.setup.prepare": "stopped\n",
        "comigs.engines.host.Client.train": "stopped: every whole round is kept; go on with: "
        "comigs resume runs/",
        "comigs.runs.report.page.write_report": "stopped\n",
    }.items():
        with patch(phase, lambda *a, **k: signal.raise_signal(sign)):
            done = comigs(capsys, "run", config)
        assert done.code == 130
        assert done.err.startswith(said) and done.err.count("\n") == 1, (phase, done.err)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["tiny", "tiny-2"]


def test_a_finished_run_is_left_as_it_is(tmp_path, capsys):
    path = tmp_path / "run"
    api.run(settings(), path)
    before = files(path)
    done = comigs(capsys, "resume", path)
    assert done.code == 0
    assert f"{path}: finished already, after 2 rounds" in done.out
    assert before.items() <= files(path).items()  # only the report is new


def test_a_run_killed_before_its_summary_gets_one(tmp_path):
    path = tmp_path / "run"
    api.run(settings(), path)
    (path / "summary.json").unlink()
    with patch("comigs.app.setup.load_base", side_effect=AssertionError("not needed")):
        api.resume(path)
    assert outcome(path) == outcome(finished() / "run")


def test_a_report_can_be_made_of_a_killed_run(tmp_path, capsys):
    path = tmp_path / "run"
    for touch in (20, 40, 60):
        assert killed_at(
            touch, path, lambda: api.resume(path) if path.exists() else api.run(settings(), path)
        )
        assert comigs(capsys, "report", path).code == 0


def test_stdout_closed_by_its_reader_is_no_traceback(capsys):
    with patch("comigs.app.cli.app", side_effect=BrokenPipeError), patch("os.dup2"):
        done = comigs(capsys, "list")
    assert (done.code, done.err) == (1, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is always full")
@pytest.mark.parametrize("words", [["list", "bases"], ["--version"]])
def test_stdout_on_a_full_disk_is_one_line(words):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "comigs", *words], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (
        2,
        "error: no space left on the disk that this is written to\n",
    )
