"""A sweep: what its file means, what is refused before anything runs, and that every run is as if
run by hand.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import tomllib
import warnings
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest

from comigs import load_config
from comigs.app import api, cli
from comigs.config import parse_config
from comigs.errors import UserError
from comigs.experiments.sweep import process, run
from comigs.experiments.sweep.eta import START, Eta
from comigs.experiments.sweep.plan import read_plan
from comigs.experiments.sweep.process import Command
from comigs.experiments.sweep.spec import flat, literal, read_sweep
from comigs.experiments.sweep.state import RunState, differences
from comigs.files import ELSEWHERE
from comigs.runs.folder import RunFolder
from comigs.runs.report.page import write_report
from comigs.text import duration
from tests.runs import comigs, files, finished, outcome, refused, write_config

SWEEP = """\
seeds = [1, 2]
baseline = "fedavg"
config = "tiny.toml"
[set]
client.lr = 1e-3
[axes.method]
fedavg = { method = "fedavg" }
ours = { method = "comigs", "experts.generalists" = 2 }
"""
LABELS = ["fedavg/seed-1", "ours/seed-1", "fedavg/seed-2", "ours/seed-2"]


class Forked:
    """As Popen of `comigs WORDS`, without importing torch again."""

    def __init__(self, words, environment, errors):
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # of forking with threads: nobody holds a lock here
            self.pid, self.returncode = os.fork(), None
        if self.pid == 0:
            try:
                os.setsid()
                sys.argv = ["comigs", *words]
                os.environ.clear()
                os.environ.update(environment)
                sys.stdout, sys.stderr = io.StringIO(), os.fdopen(os.dup(errors.fileno()), "w")
                cli.main()
            except SystemExit as end:
                sys.stderr.flush()
                os._exit(end.code)
            finally:
                os._exit(70)

    def poll(self, options=os.WNOHANG):
        if self.returncode is None and (found := os.waitpid(self.pid, options))[0]:
            self.returncode = os.waitstatus_to_exitcode(found[1])
        return self.returncode

    def wait(self):
        return self.poll(0)

    def terminate(self):
        if self.poll() is None:
            os.kill(self.pid, 15)


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """All that a run needs is imported once, and not in every forked child."""
    write_report(finished() / "run", tmp_path_factory.mktemp("warm") / "report.html")


@pytest.fixture
def sweep(tmp_path, monkeypatch, warm):
    """A sweep file of four runs of half a second, in a folder in which the test also stands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(process, "start", Forked)
    monkeypatch.setattr(run, "POLL", 0.02)
    write_config(tmp_path)
    path = tmp_path / "main.toml"
    path.write_text(SWEEP)
    return path


def edit(path, old, new):
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


# what runs


@pytest.mark.parametrize("link", ["ours", "ours/seed-2"])
def test_a_link_in_a_sweep_leads_out_of_it_nowhere(sweep, tmp_path, capsys, link):
    place, elsewhere = Path("runs/main") / link, tmp_path / "elsewhere"
    elsewhere.mkdir()
    place.parent.mkdir(parents=True)
    place.symlink_to(elsewhere)
    said = refused(capsys, "sweep", sweep)
    assert f"{place}: a symbolic link" in said and not list(elsewhere.iterdir())
    assert not [file for file in Path("runs/main").rglob("*") if file.is_file()]


def test_every_run_is_as_if_run_by_hand_and_is_not_run_again(sweep, capsys):
    done = comigs(capsys, "sweep", sweep, "--jobs", "2")
    assert (done.code, done.err) == (0, ""), done
    lines = done.out.splitlines()
    assert lines[:3] == [
        "4 runs in runs/main: 4 new",
        "estimate after the first round, 2 runs at once",
        "preparing 1 text",
    ]
    over = [line for line in lines if line.startswith("[")]
    pattern = r"\[(\d)/4\] (\S+) +perplexity [\d,.]+  \d+ s(  left about \d+ s)?"
    assert [re.fullmatch(pattern, line)[1] for line in over] == ["1", "2", "3", "4"]
    assert {re.fullmatch(pattern, line)[2] for line in over} == set(LABELS)
    assert sum("left" in line for line in over) == 3
    assert lines[-1] == "next: comigs compare runs/main"

    by_hand = load_config(
        "tiny.toml", ["client.lr=1e-3", "method='comigs'", "experts.generalists=2", "seed=2"]
    )
    api.run(by_hand, "hand")
    assert outcome(Path("hand")) == outcome(Path("runs/main/ours/seed-2"))

    before = files(Path("runs"))
    again = comigs(capsys, "sweep", sweep)
    assert again.out.splitlines() == [
        "4 runs in runs/main: 4 done",
        "next: comigs compare runs/main",
    ]
    assert files(Path("runs")) == before
    copied = comigs(
        capsys, "sweep", "runs/main/sweep.toml", "--dry-run"
    )  # its paths mean the same from there
    assert copied.out.splitlines()[0] == "4 runs in runs/main: 4 done"


def test_runs_of_machines_that_compute_in_other_numbers_are_told_apart(sweep, capsys):
    """As on a machine with bfloat16 and one without: the second is a file's word here."""
    edit(Path("tiny.toml"), 'dtype = "float32"', 'dtype = "auto"')
    comigs(capsys, "sweep", sweep)
    run, gone = (Path(f"runs/main/{label}") for label in LABELS[:2])
    here = tomllib.loads((run / "config.toml").read_text())["base"]["dtype"]
    [other] = {"bfloat16", "float32"} - {here}
    edit(run / "config.toml", f'dtype = "{here}"', f'dtype = "{other}"')
    shutil.rmtree(gone)
    said = comigs(capsys, "sweep", sweep)
    assert said.code == 0, said
    note = f'note: base.dtype = "auto" came to {other} in 1 run and {here} in 3 runs, whose bases'
    assert said.out.count(note) == 1


def test_runs_made_by_hand_are_taken_over(sweep, capsys):
    Path("elsewhere").mkdir()
    moved = Path("elsewhere/other.toml")
    text = Path("tiny.toml").read_text().replace('cache = "cache"', f'root = "{Path.cwd()}"')
    moved.write_text(text)
    api.run(
        load_config(moved, ["method='fedavg'", "seed=2", "client.lr=1e-3"]),
        "runs/main/fedavg/seed-2",
    )
    stop_after_a_round(
        load_config(moved, ["method='fedavg'", "seed=1", "client.lr=1e-3"]),
        "runs/main/fedavg/seed-1",
    )
    before = files(Path("runs/main/fedavg/seed-2"))
    shown = comigs(capsys, "sweep", sweep, "--dry-run", "--jobs", "2").out.splitlines()
    assert shown[0] == "4 runs in runs/main: 1 done, 1 to resume, 2 new"
    assert re.fullmatch(r"about \d+ s, 2 runs at once", shown[1])
    assert [re.match(r"(\S+) +(new|to resume|done) ", line).groups() for line in shown[2:]] == [
        ("fedavg/seed-1", "to resume"),
        ("ours/seed-1", "new"),
        ("fedavg/seed-2", "done"),
        ("ours/seed-2", "new"),
    ]
    assert "round 1 of 2" in shown[2] and "perplexity" in shown[4] and "about" in shown[3]
    done = comigs(capsys, "sweep", sweep, "--only", "fedavg")
    assert done.code == 0 and "[2/2] fedavg/seed-1" in done.out
    assert files(Path("runs/main/fedavg/seed-2")) == before
    api.run(load_config(moved, ["method='fedavg'", "seed=1", "client.lr=1e-3"]), "hand")
    assert outcome(Path("hand")) == outcome(Path("runs/main/fedavg/seed-1"))
    assert not Path("runs/main/ours").exists()


def stop_after_a_round(config, path):
    def stop(event):
        if event.kind == "server":
            raise KeyboardInterrupt

    with pytest.raises(UserError):
        api.run(config, path, report=stop)


def test_a_run_that_fails_is_a_line_and_the_others_go_on(sweep, capsys):
    edit(sweep, "seeds = [1, 2]", "seeds = [1]")
    edit(sweep, '{ method = "fedavg" }', '{ method = "fedavg", client.lr = 1e30 }')
    done = comigs(capsys, "sweep", sweep)
    assert (done.code, done.err) == (1, "")
    lines = done.out.splitlines()
    assert re.match(
        r"\[1/2\] fedavg/seed-1 +failed: client ann: the loss is nan in round 1", lines[3]
    ), lines
    assert any(line.startswith("[2/2] ours/seed-1") for line in lines)
    assert lines[-2] == "1 of 2 runs failed:" and lines[-1].startswith(
        "  fedavg/seed-1: client ann: the loss is nan"
    )
    log = Path("runs/main/sweep.log").read_text()
    assert log.startswith("$ comigs run ") and "error: client ann: the loss is nan" in log


def test_ctrl_c_leaves_whole_rounds_and_no_process(sweep, capsys):
    edit(sweep, "seeds = [1, 2]", "seeds = [2]")
    edit(sweep, "client.lr = 1e-3", "client.lr = 1e-3\nrounds = 400")
    started, sleep, pressed = [], time.sleep, []
    first = Path("runs/main/fedavg/seed-2")

    def keep(*words):
        started.append(Forked(*words))
        return started[-1]

    def interrupt(seconds):
        sleep(seconds)
        elsewhere = threading.current_thread() is not threading.main_thread()
        if elsewhere or pressed or not (first / "checkpoint.json").exists():
            return  # threads that other tests left sleep as well
        if RunFolder.open(first).checkpoint().round:
            pressed.append(True)  # once: whoever waits for the runs to end sleeps as well
            raise KeyboardInterrupt

    with (
        patch("comigs.experiments.sweep.process.start", keep),
        patch("comigs.experiments.sweep.run.time.sleep", interrupt),
    ):
        done = comigs(capsys, "sweep", sweep, "--jobs", "2", "--only", "seed-2")
    assert done.code == 130
    assert done.err == (
        "stopped: every whole round of every run is kept; "
        f"go on with: comigs sweep {sweep} --jobs 2 --only seed-2\n"
    )
    assert len(started) == 3 and [process.returncode for process in started] == [0, 130, 130]
    assert 0 < RunFolder.open(first).rewind().round < 400


def test_a_run_that_somebody_works_on_is_left_to_the_end(sweep, capsys):
    edit(sweep, "seeds = [1, 2]", "seeds = [1]")
    plan = read_plan(sweep)
    stop_after_a_round(plan.runs[0].config, plan.runs[0].path)
    with RunFolder.open(plan.runs[0].path):
        done = comigs(capsys, "sweep", sweep)
    assert done.code == 1
    assert "[1/2] ours/seed-1" in done.out
    assert (
        "[2/2] fedavg/seed-1  failed: another process is working on it; when it is done, go "
        "on with:" in done.out
    )


# the file


def test_seeds_are_outermost_and_axes_are_folders(sweep):
    edit(sweep, "config = ", 'skip = [{ method = "ours", dataset = "b" }]\n#')
    edit(
        sweep,
        "[axes.method]",
        '[axes.dataset]\na = { config = "tiny.toml" }\nb = { config = "tiny.toml" }\n[axes.method]',
    )
    runs = read_plan(sweep, Path("there")).runs
    assert [r.label for r in runs] == [
        f"{rest}/seed-{seed}" for seed in (1, 2) for rest in ("a/fedavg", "a/ours", "b/fedavg")
    ]
    assert runs[1].path == Path("there/a/ours/seed-1")
    config = runs[1].config
    assert (config.method, config.seed, config.client.lr, config.experts.generalists) == (
        "comigs",
        1,
        1e-3,
        2,
    )
    assert [r.label for r in read_plan(sweep, only=["fedavg/seed-2", "ours"]).runs] == [
        "a/ours/seed-1",
        "a/fedavg/seed-2",
        "a/ours/seed-2",
        "b/fedavg/seed-2",
    ]


def test_dotted_keys_and_sections_are_the_same():
    text = {"train": "a", "valid": "b", "test": "c"}
    one = {"client": {"lr": 1, "betas": [0, 1]}, "clients": {"ann": {"text": text}}}
    other = {"client.lr": 1, "client.betas": [0, 1], "clients.ann.text": text}
    assert flat(one) == flat(other) == other


@pytest.mark.parametrize(
    "value",
    [
        1,
        -2.5,
        1e-30,
        True,
        'a "b" \\ = é\n',
        [0.8, 0.9],
        [["a"], []],
        {"train": "a b", "x": {"y=": [1]}},
        [],
    ],
)
def test_what_is_given_on_the_command_line_is_the_value(value):
    written = literal(value)
    assert "\n" not in written and tomllib.loads(f"x = {written}")["x"] == value


@pytest.mark.parametrize(
    "old, new, line",
    [
        (
            "seeds = [1, 2]",
            "sedes = [1]",
            'sedes: unknown key. Did you mean "seeds"? Allowed: name, config, seeds',
        ),
        ("seeds = [1, 2]", "seeds = []", "seeds: none; give at least one"),
        ("seeds = [1, 2]", "seeds = [1, 1]", "seeds: given [1, 1]; must differ"),
        ("seeds = [1, 2]", "seeds = [-1]", "seeds.0: given -1; must be 0 or more"),
        ("seeds = [1, 2]", 'name = "../x"', "name: given '../x'; must be letters"),
        ("seeds = [1, 2]", "seeds = ", "cannot be read as TOML"),
        (
            'config = "tiny.toml"',
            "",
            'config: missing; write config = "quickstart.toml" at the top',
        ),
        ("tiny.toml", "tony.toml", 'tony.toml: no such config file. Did you mean "tiny.toml"?'),
        (
            '"fedavg" }',
            '"fedavg", config = "tiny.toml" }',
            "config: given in config and in axes.method; must be in one",
        ),
        (
            'baseline = "fedavg"',
            'baseline = "fedvag"',
            'no axis has a value "fedvag". Did you mean "fedavg"? There are',
        ),
        (
            'baseline = "fedavg"',
            'skip = [{ methods = "ours" }]',
            'skip.0: no axis "methods". Did you mean "method"?',
        ),
        (
            'baseline = "fedavg"',
            'skip = [{ method = "our" }]',
            'skip.0: no value "our". Did you mean "ours"?',
        ),
        (
            'baseline = "fedavg"',
            'skip = [{method = "ours"}, {method = "fedavg"}]',
            "skip: every run is skipped",
        ),
        ("ours = {", '"a/b" = {', 'axes.method: the name "a/b" is also a folder'),
        ("ours = {", "Fedavg = {", "axes.method: two values have the same name"),
        (
            'ours = { method = "comigs", ',
            'ours = "comigs" #',
            "axes.method.ours: given 'comigs'; must be a section, or {",
        ),
        ("client.lr = 1e-3", "seed = 3", "set: seed: write seeds = [42, ...] at the top"),
        (
            '"comigs"',
            '"comgis"',
            'axes.method.ours: method: unknown method "comgis". Did you mean "comigs"? Known: ',
        ),
        ("client.lr", "client.rl", 'set: client.rl: unknown key. Did you mean "lr"?'),
        ("client.lr = 1e-3", "rounds = 0", "set: rounds: given 0; must be 1 or more"),
        (
            '"experts.generalists" = 2',
            "clients.eve.rank = 2",
            'axes.method.ours: clients.eve.rank=2: no client "eve"',
        ),
        (
            "client.lr",
            "client.steps.lr",
            "set: client.steps.lr=0.001: client.steps is a value, not a section",
        ),
    ],
)
def test_a_wrong_sweep_is_refused_whole(sweep, capsys, old, new, line):
    """Nothing is run of a sweep with one wrong run, and nothing is written."""
    edit(sweep, old, new)
    before = files(sweep.parent)
    said = refused(capsys, "sweep", sweep)
    assert line in said and said.startswith(f"error: {sweep}: ")
    assert files(sweep.parent) == before


def test_a_wrong_text_or_base_is_said_before_the_first_run(sweep, capsys):
    edit(sweep, '"experts.generalists" = 2', 'base.name = "tiny-gtp2"')
    done = comigs(capsys, "sweep", sweep)
    assert done.code == 2 and 'unknown base "tiny-gtp2". Did you mean "tiny-gpt2"?' in done.err
    assert done.err.startswith(f"error: {sweep}: ours/seed-1: ") and done.err.count("\n") == 1
    assert not Path("runs").exists()


def test_wrong_words(sweep, capsys):
    assert "nowhere.toml: no such sweep file" in refused(capsys, "sweep", "nowhere.toml")
    assert '--only x --only y: in no run\'s path; one is "fedavg/seed-1"' in refused(
        capsys, "sweep", sweep, "--only", "x", "--only", "y"
    )
    assert "--jobs" in refused(capsys, "sweep", sweep, "--jobs", "0")


# what is in the folders already


def test_a_run_with_another_config_is_refused_and_left_alone(sweep, capsys):
    api.run(load_config("tiny.toml", ["method='fedavg'", "seed=2"]), "runs/main/fedavg/seed-2")
    before = files(Path("runs"))
    assert (
        "runs/main/fedavg/seed-2: a run with another config is there: client.lr is 0.002 in "
        "it and 0.001 in this "
        "sweep; nothing was changed. Move it away, or choose another folder with --out"
    ) in refused(capsys, "sweep", sweep)
    edit(Path("runs/main/fedavg/seed-2/config.toml"), "rounds = 2", "laps = 2")
    line = refused(capsys, "sweep", sweep)
    assert "laps: unknown key" in line and line.endswith(
        "Move runs/main/fedavg/seed-2 away, or " + ELSEWHERE
    )
    edit(Path("runs/main/fedavg/seed-2/config.toml"), "laps = 2", "rounds = 2")
    Path("other/ours/seed-1").mkdir(parents=True)
    assert "other/ours/seed-1: exists and is no run folder; nothing was changed" in refused(
        capsys, "sweep", sweep, "--out", "other"
    )
    Path("file").write_text("mine")
    assert "is a file, not a folder; choose another folder with --out" in refused(
        capsys, "sweep", sweep, "--out", "file"
    )
    assert files(Path("runs")) == before


def test_the_folder_of_another_sweep_is_refused(sweep, capsys):
    Path("runs/main").mkdir(parents=True)
    there = Path("runs/main/sweep.toml")
    there.write_text(SWEEP + '[axes.rank]\nlow = { config = "x" }\n'.replace("config", "method"))
    assert "runs/main: is the folder of a sweep with name sweep, this one has main" in refused(
        capsys, "sweep", sweep
    )
    there.write_text('name = "main"\n' + there.read_text())
    assert "a sweep with axes method, rank, this one has method; choose another folder" in refused(
        capsys, "sweep", sweep
    )
    assert "axes.rank" in there.read_text()


@pytest.mark.parametrize(
    "wanted, there, fields",
    [
        ({}, {"base": {"dtype": "float32", "device": "cpu", "threads": 3}}, []),
        ({}, {"client": {"lr": 2e-3, "router_lr": 2e-3}}, []),
        ({}, {"name": "x", "data": {"root": "/a", "cache": "elsewhere"}}, []),
        (
            {},
            {"client": {"lr": 5e-4, "router_lr": 5e-4}},
            ["client.lr"],
        ),  # no base's default: somebody gave it
        ({"client": {"lr": 1.0}}, {"client": {"lr": 1.0, "router_lr": 2.0}}, ["client.router_lr"]),
        (
            {"base": {"memory": "1GB"}},
            {
                "base": {"memory": "1GB", "recompute": True},
                "client": {"micro_batch_size": 2},
                "evaluation": {"batch_size": 4},
            },
            [],
        ),
        ({}, {"client": {"micro_batch_size": 2}}, ["client.micro_batch_size"]),
        ({"conditions": {"speed": 0.5}}, {"conditions": {"speed": 0.5, "machine": 123.4}}, []),
        (
            {"conditions": {"speed": 0.5, "machine": 9.0}},
            {"conditions": {"speed": 0.5, "machine": 8.0}},
            ["conditions.machine"],
        ),
        ({"base": {"dtype": "float64"}}, {"base": {"dtype": "float32"}}, ["base.dtype"]),
        ({"seed": 1}, {"seed": 2}, ["seed"]),
        ({"options": {"mu": 0.1}}, {}, ["options.mu"]),
        ({"clients": [{"name": "ann", "text": "y"}]}, {}, ["clients.ann.text"]),
        ({"data": {"root": "/a"}}, {"data": {"root": "/a/../b"}}, ["clients.ann.text"]),
        (
            {"data": {"root": "/a"}},
            {"data": {"root": "/b"}, "clients": [{"name": "ann", "text": "../a/x"}]},
            [],
        ),
        ({"clients": [{"name": "bob", "text": "x"}]}, {}, ["clients.bob.name", "clients.bob.text"]),
    ],
)
def test_what_makes_it_another_run(wanted, there, fields):
    ann = {"clients": [{"name": "ann", "text": "x"}], "data": {"root": "/a"}}
    found = [
        name for name, *_ in differences(parse_config(ann | wanted), parse_config(ann | there))
    ]
    assert found[: len(fields)] == fields and bool(found) == bool(fields)


# time


def test_a_run_takes_as_long_as_those_most_like_it(sweep):
    edit(sweep, "seeds = [1, 2]", "seeds = [1, 2, 3]")
    runs = {r.label: r for r in read_plan(sweep).runs}
    eta = Eta()
    todo = [
        (runs[label], RunState(), 0.0)
        for label in ("ours/seed-2", "fedavg/seed-2", "fedavg/seed-3")
    ]
    assert eta.left(todo, 1) is None
    eta.learn(runs["fedavg/seed-1"], RunState(round=1, begun=True, seconds=50.0))  # half of it
    assert (
        eta.seconds(runs["fedavg/seed-2"]) == eta.seconds(runs["ours/seed-2"]) == pytest.approx(100)
    )
    eta.learn(runs["ours/seed-1"], RunState(round=2, begun=True, finished=True, seconds=300.0))
    assert eta.left(todo, 1) == pytest.approx(300 + 100 + 100 + 3 * START)
    assert eta.left(todo, 2) == pytest.approx(310)  # the longest one is longer than the half of all
    eta.learn_start(runs["ours/seed-2"], RunState(), RunState(seconds=100.0), 104.0)
    # with workers, clients have their seconds at once; of many clients, a round asks some
    at_once, twice = runs["fedavg/seed-1"], Eta()
    at_once = replace(at_once, config=at_once.config.model_copy(update={"workers": 2}))
    twice.learn(at_once, RunState(round=1, begun=True, seconds=50.0))
    assert twice.seconds(runs["fedavg/seed-2"]) == pytest.approx(50)
    half = (runs["ours/seed-2"], RunState(round=1, begun=True, seconds=150.0), 30.0)
    assert eta.left([half], 1) == pytest.approx(150 + 4 - 30)


def test_runs_of_another_machine_say_how_runs_compare_and_those_of_this_one_how_fast_it_is(sweep):
    edit(sweep, "seeds = [1, 2]", "seeds = [1, 2, 3]")
    runs = {r.label: r for r in read_plan(sweep).runs}
    eta = Eta()
    for label, seconds in (("ours/seed-1", 300.0), ("fedavg/seed-1", 100.0)):
        eta.learn(
            runs[label], RunState(round=2, begun=True, finished=True, seconds=seconds), here=False
        )
    assert eta.seconds(runs["fedavg/seed-2"]) == pytest.approx(100)
    eta.learn(
        runs["ours/seed-2"], RunState(round=2, begun=True, finished=True, seconds=150.0)
    )  # twice as fast
    assert eta.seconds(runs["fedavg/seed-2"]) == pytest.approx(50)
    assert eta.seconds(runs["ours/seed-3"]) == pytest.approx(150)


def test_how_time_is_said():
    assert [duration(s, "clock") for s in (3.4, 59.6, 250, 7500)] == [
        "3 s",
        "1 min 00 s",
        "4 min 10 s",
        "2 h 05 min",
    ]
    assert [duration(s, "about") for s in (50, 300, 5400, 18000, 43200)] == [
        "about 50 s",
        "about 5 min",
        "about 1.5 h",
        "about 5.0 h",
        "about 12 h",
    ]


@pytest.mark.parametrize(
    "cpus, jobs, own, threads", [(8, 2, None, 4), (8, 3, None, 2), (2, 4, None, 1), (8, 2, 5, 5)]
)
def test_runs_share_the_cpus(sweep, cpus, jobs, own, threads):
    edit(Path("tiny.toml"), "threads = 1\n", f"threads = {own}\n" if own else "")
    with patch("os.sched_getaffinity", lambda _: set(range(cpus)), create=True):
        assert run.threads(read_plan(sweep).runs[0], jobs) == threads
        assert run.threads(read_plan(sweep).runs[0], 1) == own
    assert f"base.threads={threads}" in read_plan(sweep).runs[0].words("run", threads)


# processes


def test_a_process_tells_why_it_failed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def problem(*words, after=lambda process: None):
        process = Command(list(words), threads=3)
        after(process)
        process.wait()
        assert process.ended()
        return process.problem()

    assert problem("--version") == ""
    assert problem("run", "nowhere.toml") == "nowhere.toml: no such config file"
    assert (
        problem("--version", after=Command.kill) == "killed by SIGKILL, perhaps for want of memory"
    )


@pytest.mark.slow
def test_the_whole_thing_in_real_processes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    edit(write_config(tmp_path), "threads = 1\n", "")
    Path("main.toml").write_text(SWEEP)
    done = comigs(capsys, "sweep", "main.toml", "--jobs", "4", "--only", "seed-1")
    assert done.code == 0, done
    environment = json.loads(Path("runs/main/ours/seed-1/env.json").read_text())
    cpus = len(os.sched_getaffinity(0))
    assert environment["machine"]["threads"] == max(1, cpus // 4)
    assert environment["command"][:3] == ["comigs", "run", "tiny.toml"]


def test_reading_a_sweep_needs_no_torch():
    code = (
        "import sys, comigs.experiments.sweep.spec, comigs.experiments.sweep.process; "
        "assert 'torch' not in sys.modules"
    )
    with tempfile.TemporaryFile() as errors:
        done = process.subprocess.run([sys.executable, "-c", code], stderr=errors)
    assert done.returncode == 0


def test_the_resolved_sweep_is_the_sweep(sweep, capsys):
    comigs(capsys, "sweep", sweep, "--only", "fedavg/seed-1")
    written = read_sweep(Path("runs/main/sweep.toml"))
    assert written.model_copy(update={"config": "tiny.toml"}) == read_sweep(sweep)
    assert list(written.axes["method"]) == ["fedavg", "ours"]


def test_the_page_shows_a_valid_sweep(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "sweep.md").read_text(encoding="utf-8")
    path = tmp_path / "main.toml"
    path.write_text(re.search(r"```toml\n(.*?)```", page, re.DOTALL)[1])
    shown = read_sweep(path)
    assert shown.set == {"rounds": 20, "client.batch_size": 4} and list(shown.axes) == [
        "dataset",
        "method",
    ]
    assert shown.config_of({"dataset": "topics", "method": "local"}) == (
        "../topics.toml",
        "axes.dataset.topics.config",
    )
