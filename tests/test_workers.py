"""Clients spread over processes: the same run to the bit, one base in each, and nothing left
behind.
"""

from __future__ import annotations

import json
import os
import signal
import time

import psutil
import pytest
import torch

from comigs.app import api, setup
from comigs.engines import workers
from comigs.errors import UserError
from comigs.runs.folder import RunFolder
from tests.conftest import run_config
from tests.kills import in_child
from tests.runs import outcome, refused, write_config

NAMES = "ada bob cyd"
SLOW = pytest.mark.slow  # a process takes seconds to load torch


@pytest.fixture(autouse=True)
def four_cores(monkeypatch):
    """Workers are counted, not timed: any machine will do."""
    monkeypatch.setattr(workers, "cpus", lambda: 4)


def children():
    return [
        p
        for p in psutil.Process().children(recursive=True)
        if "comigs.engines.workers" in " ".join(p.cmdline())
    ]


SETTINGS = [
    ({}, 16),  # 2 local steps and 2 router steps of each of 2 clients in 2 rounds, ...
    ({"method": "pcl", "upload": {"format": "int8"}}, 8),  # here clients measure each other
    ({"method": "flora", "rounds": 3}, 12),
]


@pytest.mark.parametrize(
    ("settings", "steps"), SETTINGS[:1] + [pytest.param(*s, marks=SLOW) for s in SETTINGS[1:]]
)
def test_a_run_by_two_processes_is_the_run_by_one_to_the_bit(tmp_path, settings, steps):
    outcomes = []
    for count in (1, 2):
        out = tmp_path / f"run-{count}"
        seen = []
        sampled = {"participation": {"clients_per_round": 2}, "evaluation": {"every": 1}}
        config = run_config(tmp_path, NAMES, workers=count, **sampled, **settings)
        api.run(config, out, seen.append)
        outcomes.append(outcome(out))
        assert len([event for event in seen if event.kind == "step"]) == steps  # from all processes
    assert outcomes[0] == outcomes[1]
    assert not children()


@SLOW
def test_work_is_really_elsewhere(tmp_path, monkeypatch):
    here, exchange = [], workers.ClientHost.exchange
    monkeypatch.setattr(
        workers.ClientHost, "exchange", lambda *given: here.append(given[1]) or exchange(*given)
    )
    seen = set()
    api.run(
        run_config(tmp_path, NAMES, workers=3, rounds=6),
        tmp_path / "run",
        lambda _: seen.update(children()),
    )
    assert len(seen) == 2 and len(here) < 7 * 3


@SLOW
def test_it_can_be_gone_on_with_by_any_number(tmp_path):
    config = run_config(tmp_path, NAMES, rounds=3)
    api.run(config, tmp_path / "whole")

    def stop(event):
        if event.kind == "server" and event.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(UserError, match="every whole round is kept"):
        api.run(config.model_copy(update={"workers": 2}), tmp_path / "run", stop)
    assert not children()
    api.resume(tmp_path / "run", workers=3)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@SLOW
def test_what_goes_wrong_there_is_said_here(tmp_path):
    config = run_config(tmp_path, NAMES, workers=3, client={"lr": 1e30, "router_lr": 1e30})
    with pytest.raises(UserError, match=r"client .*: .* in round .*client.lr"):
        api.run(config, tmp_path / "run")
    assert not children()


@pytest.mark.slow  # processes that each import all of transformers
def test_one_that_dies_is_named_and_the_run_can_go_on(tmp_path):
    config = run_config(tmp_path, NAMES, workers=2, rounds=4)

    def kill(event):
        if event.kind == "server" and event.round == 2:
            for child in children():
                child.kill()

    with pytest.raises(
        UserError, match=r"worker 1: ended with code -9 .* comigs resume .*/run --workers 1"
    ):
        api.run(config, tmp_path / "run", kill)
    api.resume(tmp_path / "run", workers=1)
    api.run(config.model_copy(update={"workers": 1}), tmp_path / "whole")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@SLOW
def test_workers_end_with_the_run_also_where_it_is_killed(tmp_path):
    config, note = run_config(tmp_path, NAMES, workers=2, rounds=4), tmp_path / "workers"

    def work():
        def look(event):
            if event.kind == "server":
                note.write_text(json.dumps([child.pid for child in children()]))
                os.kill(os.getpid(), signal.SIGKILL)

        api.run(config, tmp_path / "run", look)

    assert in_child(work) == signal.SIGKILL
    (left,) = json.loads(note.read_text())
    until = time.monotonic() + 30
    while psutil.pid_exists(left) and psutil.Process(left).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until, "a worker is still there"
        time.sleep(0.05)
    api.resume(tmp_path / "run")
    assert RunFolder.open(tmp_path / "run").checkpoint().finished


def test_more_workers_than_devices_are_refused(tmp_path, capsys, monkeypatch):
    config = write_config(tmp_path)
    line = refused(capsys, "run", config, "--set", "workers=5", "--out", tmp_path / "run")
    assert line == "error: workers: given 5, but this machine has 4 CPU cores; must be 1 to 4"
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert workers.devices(2, torch.device("cuda")) == ["cuda:0", "cuda:1"]
    assert workers.devices(2, torch.device("cuda:1")) == ["cuda:1", "cuda:0"]
    with pytest.raises(UserError, match="given 3, but this machine has 2 GPUs; must be 1 to 2"):
        workers.devices(3, torch.device("cuda"))


def test_cores_are_divided_among_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "cpus", lambda: 4)
    config, said = run_config(tmp_path, NAMES, workers=2, base={"threads": None}), []
    _, resolved = setup.load(config, said.append)
    assert resolved.base.threads == 2 and said[0].endswith("2 CPU threads in each of 2 processes")


def test_one_worker_starts_no_process(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "Worker", None)
    assert (api.run(run_config(tmp_path, NAMES), tmp_path / "run").path / "summary.json").exists()
