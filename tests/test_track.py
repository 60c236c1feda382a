"""Trackers hold what a run has committed: all of it, once, nothing private, and none ends a run."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import shutil
import signal
import socket
import sys
import typing
import warnings
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import pytest

from comigs import load_config
from comigs.app import api
from comigs.config import SECTIONS
from comigs.errors import UserError
from comigs.federation.messages import config_for
from comigs.files import ClosedFolder
from comigs.runs.metrics import Evaluation, Note
from comigs.runs.track import settings as told
from comigs.runs.track.curves import Curves, Row
from comigs.runs.track.tracker import list_trackers
from comigs.runs.track.trackers.tensorboard import Events
from comigs.runs.track.tracks import Tracks
from tests import trackers
from tests.kills import in_child, kill_self
from tests.runs import comigs, copied_run, finished, outcome, refused, write_text

needs = {}  # a tracker -> the mark of tests that read what it wrote
for name in ("mlflow", "tensorboard", "wandb"):
    missing = importlib.util.find_spec(name) is None
    needs[name] = pytest.mark.skipif(missing, reason=f"comigs[{name}] is not installed")
here = [name for name in needs if importlib.util.find_spec(name) is not None]
STEPS = 2
SEEN = {"ann": "client-1", "bob": "client-2"}
USER, HOST = "quillon-the-user", "host-of-quillon"
quietly = pytest.mark.filterwarnings("ignore")  # of the trackers' own making


def settings(to, *more):
    """The config of the finished run of tests/runs.py, which is the run nobody touched."""
    names = ", ".join(f'"{name}"' for name in to)
    cache = f'data.cache="{finished() / "cache"}"'
    return load_config(finished() / "tiny.toml", [cache, f"track.to=[{names}]", *more])


def notes(report):
    return [event.message for event in report if isinstance(event, Note) and event.say]


def holds_all(run, points, seen=SEEN, exact=True):
    """Whether points are those of metrics.jsonl, each once."""
    expected = trackers.from_lines(run, seen, STEPS)
    if not exact:
        expected = trackers.as_float32(expected)
    assert len(points) == len(dict(points)), "a moment is there twice"
    assert dict(points) == pytest.approx(expected, rel=1e-12)
    assert len(expected) > 30


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """A run with every tracker that is here, killed between two of them, and resumed; what it
    reported, and all places that trackers may have written to.
    """
    home = tmp_path_factory.mktemp("home-of-quillon")
    run = tmp_path_factory.mktemp("place-of-quillon") / "case"
    own = {"HOME": str(home), "USER": USER, "LOGNAME": USER, "WANDB_CACHE_DIR": str(home / "c")}
    tell, told_so_far, report = Tracks._tell, itertools.count(1), []

    def tell_and_die(self, name, rows):
        tell(self, name, rows)
        if next(told_so_far) == len(here) + 1:  # the first tracker has the first round
            kill_self()

    def harmed():
        with patch.object(Tracks, "_tell", tell_and_die):
            api.run(settings(here), run)

    with pytest.MonkeyPatch.context() as patched, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, value in own.items():
            patched.setenv(name, value)
        patched.setattr(socket, "gethostname", lambda: HOST)
        patched.setattr(sys, "argv", [f"/home/{USER}/program.py", "--secret-of-quillon"])
        assert in_child(harmed) == signal.SIGKILL
        api.resume(run, report.append)
    return run, report, (run / "track", home)


@needs["tensorboard"]
def test_tensorboard_reads_every_moment_once(resumed):
    holds_all(resumed[0], trackers.of_tensorboard(resumed[0]), exact=False)


@quietly
@needs["mlflow"]
def test_mlflow_reads_every_moment_once(resumed):
    holds_all(resumed[0], trackers.of_mlflow(resumed[0]))


@quietly
@needs["wandb"]
def test_wandb_reads_every_moment_once(resumed):
    holds_all(resumed[0], trackers.of_wandb(resumed[0], STEPS))
    records = trackers.wandb_records(resumed[0])
    steps = [r.history.step.num for r in records if r.WhichOneof("record_type") == "history"]
    assert steps == list(range(len(steps)))


@pytest.mark.skipif(not here, reason="no tracker is installed")
def test_a_tracked_run_is_the_run_nobody_watches(resumed):
    assert outcome(resumed[0]) == outcome(finished() / "run")
    assert notes(resumed[1]) == []


@pytest.mark.skipif(not here, reason="no tracker is installed")
def test_no_byte_of_a_tracker_is_private(resumed):
    run, _, places = resumed
    private = ["quillon", "ann", "bob", "tiny.toml", "metrics.jsonl", str(Path.cwd()), str(run)]
    private += [str(finished()), sys.prefix, HOST, USER, os.uname().nodename]
    words = "|".join(map(re.escape, private))
    wanted = re.compile(rf"(?<![A-Za-z0-9])({words})(?![A-Za-z0-9])".encode())
    found = trackers.written(*places)
    assert len(found) >= len(here)
    for name, content in found.items():
        assert not wanted.search(name.encode()), name
        assert not wanted.search(content), (name, wanted.search(content))


@needs["tensorboard"]
@pytest.mark.parametrize("told_before", [1, 2, 3])
@pytest.mark.parametrize("written", [False, True], ids=["before", "after"])
@pytest.mark.few(2)
def test_killed_around_any_commit(tmp_path, told_before, written):
    run, tell, calls = tmp_path / "run", Tracks._tell, itertools.count()

    def tell_and_die(self, name, rows):
        dies = next(calls) == told_before
        if written or not dies:
            tell(self, name, rows)
        if dies:
            kill_self()

    def harmed():
        with patch.object(Tracks, "_tell", tell_and_die):
            api.run(settings(["tensorboard"]), run)

    assert in_child(harmed) == signal.SIGKILL
    api.resume(run)
    holds_all(run, trackers.of_tensorboard(run), exact=False)
    assert outcome(run) == outcome(finished() / "run")


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A finished run with TensorBoard, which sees names."""
    run = tmp_path_factory.mktemp("watched") / "run"
    api.run(settings(["tensorboard"], "track.names=true"), run)
    return run


@needs["tensorboard"]
def test_names_are_told_where_that_is_asked_for(watched):
    points = trackers.of_tensorboard(watched)
    holds_all(watched, points, {"ann": "ann", "bob": "bob"}, exact=False)


@needs["tensorboard"]
@pytest.mark.parametrize("kept", [0, 1, 40, 200, -1])
def test_what_a_torn_file_lacks_is_written_once_more(watched, tmp_path, kept):
    run = Path(shutil.copytree(watched, tmp_path / "run"))
    file = next((run / "track" / "tensorboard" / "clients" / "bob").iterdir())
    file.write_bytes(file.read_bytes()[:kept])
    for _ in range(2):  # the second time nothing is missing
        api.resume(run)
    names = {"ann": "ann", "bob": "bob"}
    holds_all(run, trackers.of_tensorboard(run), names, exact=False)


@needs["tensorboard"]
def test_what_is_no_number_there_is_kept_out(tmp_path):
    curves = Curves(settings(["tensorboard"]))
    line = {"round": 1, "client": "ann", "split": "valid", "model": "personal"}
    bad = Evaluation.model_construct(**line, nats_per_token=float("nan"), perplexity=float("inf"))
    assert curves.rows([bad]) == []
    events = Events(ClosedFolder(tmp_path))
    events.write([Row(0, "server", 1, 1, {"big": 1e300, "small": 1.5})])  # no float32
    events.close(True)
    top = tmp_path / "track"
    assert trackers.of_tensorboard(tmp_path) == [(("server", "small", 1), 1.5)], list(
        top.rglob("*")
    )


@needs["tensorboard"]
@pytest.mark.parametrize("failing", [1, 9])
def test_a_tracker_that_fails_is_a_note_and_catches_up(tmp_path, failing):
    """failing: so many writes in a row, from the first round on."""
    run, report, write, calls = tmp_path / "run", [], Events.write, itertools.count()

    def fails(self, rows):
        if 1 <= next(calls) <= failing:
            write(self, rows[:3])
            raise ConnectionError("the server\nis gone")
        write(self, rows)

    with patch.object(Events, "write", fails):
        api.run(settings(["tensorboard"]), run, report.append)
    said = notes(report)
    assert said[0] == (
        "warning: track.to: tensorboard: ConnectionError: the server is gone; "
        "the run goes on without it"
    )
    assert outcome(run) == outcome(finished() / "run")
    if failing == 9:
        assert said[1:] == [
            "warning: track.to: tensorboard lacks a part of this run; when it works again: "
            f"comigs resume {run}"
        ]
        api.resume(run)
    holds_all(run, trackers.of_tensorboard(run), exact=False)


@needs["tensorboard"]
def test_a_full_disk_is_a_note(tmp_path):
    report = []
    with patch.object(Events, "_new_file", lambda self, of: open("/dev/full", "wb")):
        api.run(settings(["tensorboard"]), tmp_path / "run", report.append)
    assert "OSError: [Errno 28] No space left on device" in notes(report)[0]
    assert outcome(tmp_path / "run") == outcome(finished() / "run")


@quietly
@needs["mlflow"]
def test_a_server_that_is_not_there_is_a_note(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    report = []
    api.run(settings(["mlflow"]), tmp_path / "run", report.append)
    assert len(notes(report)) == 2 and "127.0.0.1" in notes(report)[0]
    assert outcome(tmp_path / "run") == outcome(finished() / "run")
    assert not (tmp_path / "run" / "track" / "mlflow.db").exists()


@quietly
@needs["wandb"]
def test_nobody_is_asked_for_a_key(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    report = []
    api.run(settings(["wandb"]), tmp_path / "run", report.append)
    assert "no API key; run: wandb login" in notes(report)[0]
    assert outcome(tmp_path / "run") == outcome(finished() / "run")


@needs["tensorboard"]
def test_no_link_is_followed(watched, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run = Path(shutil.copytree(watched, tmp_path / "inner"))
    shutil.rmtree(run / "track" / "tensorboard")
    (run / "track" / "tensorboard").symlink_to(elsewhere)
    report = []
    api.resume(run, report.append)
    assert "a symbolic link" in notes(report)[0]
    shutil.rmtree(run / "track")
    (run / "track").symlink_to(elsewhere)
    with pytest.raises(UserError, match="track: a symbolic link"):
        api.resume(run)
    assert list(elsewhere.iterdir()) == []


def test_what_is_not_installed_is_refused_at_once(tmp_path, capsys):
    write_text(tmp_path, "ann")
    with patch("importlib.util.find_spec", lambda name: None):
        line = refused(
            capsys, "run", finished() / "tiny.toml", "--set", 'track.to=["wandb"]', "--out",
            tmp_path / "run",
        )  # fmt: skip
        assert line.endswith("track.to: \"wandb\" needs wandb: pip install 'comigs[wandb]'")
        # a run that has begun elsewhere goes on here
        run, report = copied_run(tmp_path / "there"), []
        with_tracker = (run / "config.toml").read_text().replace("to = []", 'to = ["wandb"]')
        (run / "config.toml").write_text(with_tracker)
        api.resume(run, report.append)
    assert "needs wandb: pip install" in notes(report)[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "to, said",
    [
        ('["tensorbord"]', 'unknown tracker "tensorbord". Did you mean "tensorboard"?'),
        ('["wandb", "wandb"]', '"wandb" is given twice'),
        ('"wandb"', "must be a list"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, to, said):
    words = ("run", finished() / "tiny.toml", "--set", f"track.to={to}", "--out", tmp_path / "run")
    if "twice" in said and "wandb" not in here:
        pytest.skip("comigs[wandb] is not installed")
    line = refused(capsys, *words)
    assert "track.to: " in line and said in line
    assert not (tmp_path / "run").exists()


@needs["tensorboard"]
def test_a_dry_run_says_where_curves_would_go(tmp_path, capsys):
    words = ("run", finished() / "tiny.toml", "--dry-run", "--set", 'track.to=["tensorboard"]')
    done = comigs(capsys, *words)
    line = "curves go to tensorboard (track/tensorboard of the run folder), clients as client-1"
    assert done.code == 0 and line in done.out


def test_no_setting_that_trackers_see_is_free_text():
    """A new field of these sections whose text may say anything would be found here."""
    for name in told.SECTIONS:
        for key, field in SECTIONS[name].model_fields.items():
            kinds = [field.annotation, *typing.get_args(field.annotation)]
            assert str not in kinds and Path not in kinds, f"{name}.{key}"
            texts = [k for k in kinds if typing.get_origin(k) is Literal]
            assert all(isinstance(text, str) for k in texts for text in typing.get_args(k))


def test_names_and_paths_are_no_settings(tmp_path):
    base = {"name": str(tmp_path)}
    options = {"adopt": "quillon", "factor": 2.0}
    config = settings([], "method=quillon.own")
    config = config.model_copy(
        update={"base": config.base.model_copy(update=base), "options": options}
    )
    seen = told.settings_of(config)
    assert seen["options.factor"] == 2.0 and seen["client.steps"] == STEPS
    assert "quillon" not in str(seen) and str(tmp_path) not in str(seen)
    assert not [value for value in seen.values() if "/" in str(value)]
    assert told.settings_of(settings([]))["method"] == "comigs"


def test_devices_are_not_told_where_curves_go():
    told_device = config_for(settings(["tensorboard"], "track.names=true"), "ann")
    assert "track" not in told_device and "tensorboard" not in str(told_device)


def test_every_tracker_has_its_tests():
    assert list_trackers() == sorted(needs)
