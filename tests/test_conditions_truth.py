"""The simulator against the truth: a federation over real processes whose devices have slow links.

Links and work are slowed down by sleeping in the device's trainer, before and after it answers. The
same conditions, simulated, must tell who is late and how long a round takes. What Flower itself
adds to each message here (a process for each, looks for answers) is measured by the first run, and
is part of the latency by which the second is told beforehand.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from comigs import load_config
from comigs.app import api
from comigs.engines.conditions.engine import READ
from comigs.runs.simulated import Exchange
from tests import deployment
from tests.deployment import Deployment, wait

CLIENTS = ("ann", "bob", "cyd", "dan")
KILLED = "dan"
LINKS = {  # bytes and tokens per second, seconds
    "ann": {"tokens_per_second": 20.0, "upload": 20e3, "download": 40e3, "latency": 1.0},
    "bob": {"tokens_per_second": 8.0, "upload": 10e3, "download": 20e3, "latency": 2.0},
    "cyd": {"tokens_per_second": 4.0, "upload": 6e3, "download": 12e3, "latency": 1.0},
    "dan": {"tokens_per_second": 15.0, "upload": 15e3, "download": 30e3, "latency": 1.0},
}
SLOW = """
import json, os, pathlib, sys, time

if any("trainer_main" in word for word in sys.orig_argv):
    from comigs.federation.device import trainer_socket

    own = json.loads(os.environ["SLOW_LINKS"])
    link = own["links"][pathlib.Path.cwd().name.removeprefix("home-")]
    serve = trainer_socket.serve

    def slowly(socket, key, answer, *most):
        def slow(raw):
            from comigs.federation import messages
            from comigs.server import wire

            time.sleep(link["latency"] + len(raw) / link["download"])
            began, said = time.monotonic(), answer(raw)
            head, _ = wire.unpack(said, messages.ANSWERS, 1 << 30)
            lines = getattr(head, "metrics", [])
            if getattr(head, "trained", False):
                trained = [line for line in lines if line["kind"] == "train"]
                work = sum(
                    line["trained_tokens"]
                    + line["router_steps"] * line["trained_tokens"] // line["local_steps"]
                    for line in trained
                )
                work += own["read"] * sum(line.get("tokens") or 0 for line in lines)
                left = work / link["tokens_per_second"] - (time.monotonic() - began)
                time.sleep(max(0, left))
                time.sleep(link["latency"] + len(said) / link["upload"])
            return said

        serve(socket, key, slow, *most)

    trainer_socket.serve = slowly
"""
PATIENT = """
[experts]
rank = 64
specialists = 1
[options]
adopt = "all"
specialists = "apart"
[participation]
deadline = {deadline}
"""
AGREE = 0.2  # of the simulated seconds of a round


def written(folder: Path, name: str, deadline: float, conditions: dict | None = None) -> Path:
    """A config of these clients; with conditions it has its text and is for one process."""
    rounds = 3 if name.startswith("hasty") else 2
    tiny = deployment.TINY.partition("[[clients]]")[0].format(rounds=rounds)
    text = tiny + PATIENT.format(deadline=deadline)
    for client in CLIENTS:
        text += f'[[clients]]\nname = "{client}"\nweight = 1.0\n'
        if conditions is not None:
            text += f'text = "{client}"\n'
    for client, own in (conditions or {}).items():
        text += f"[conditions.clients.{client}]\n"
        text += "".join(f"{key} = {json.dumps(value)}\n" for key, value in own.items())
    path = folder / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return path


def simulated(
    folder: Path, name: str, deadline: float, dies_after: float | None = None, added: float = 0.0
):
    """Seconds of each round and who was absent why; dies_after: seconds in round 2, of one. added:
    seconds that a message takes beside what its link does.
    """
    links = {client: dict(link) for client, link in LINKS.items()}
    for link in links.values():
        link["latency"] += added / 2
    if dies_after is not None:
        # it is known only from the first two rounds when the second begins
        begins = simulated(folder, f"{name}-whole", deadline, added=added)[0][0]
        rows = f"{KILLED},0,1\n{KILLED},{begins + dies_after},0\n{KILLED},1e9,0\n"
        links[KILLED]["trace"] = f"client,seconds,available\n{rows}"
    before = Path.cwd()
    os.chdir(folder)
    try:
        run = api.run(load_config(written(folder, name, deadline, links)), folder / f"{name}-run")
    finally:
        os.chdir(before)
    lines = run.metrics()
    seconds = [line.ended - line.began for line in lines if isinstance(line, Exchange)]
    return seconds, absences(line.as_json() for line in lines)


def absences(lines) -> set[tuple[int, str, str]]:
    """Who gave nothing usable in which round, in words that do not name the moment."""
    found = [line for line in lines if line["kind"] == "absent" and line["round"] <= 3]
    told = {(line["round"], line["client"], line["reason"].partition(":")[0]) for line in found}
    # A device that died is given up 30 to 60 seconds after: by chance before the deadline or not.
    lost = {"gone", "no answer by the deadline"}
    told = {
        (number, client, "lost" if client == KILLED and why in lost else why)
        for number, client, why in told
    }
    # the exchange after the last round is not simulated
    return {each for each in told if each[2] != "too late, in round 4"}


class Watch(threading.Thread):
    """When each round of a federated run begins and ends, by what its server reports."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self.path, self.begun, self.ended = path, dict[int, float](), dict[int, float]()
        self.over = False
        self.start()

    def run(self) -> None:
        """Look at the file as it grows."""
        read = 0
        while not self.over:
            time.sleep(0.05)
            raw = self.path.read_bytes() if self.path.exists() else b""
            whole = raw[read : raw.rfind(b"\n") + 1]
            read += len(whole)
            for line in map(json.loads, whole.splitlines()):
                if line["kind"] == "note" and line["message"].startswith("round "):
                    number = int(line["message"].split()[1].rstrip(":"))
                    self.begun.setdefault(number, time.monotonic())
                elif line["kind"] == "server":
                    self.ended[line["round"]] = time.monotonic()


@pytest.mark.slow
def test_simulated_and_measured_seconds_agree_and_who_is_late_is_the_same(tmp_path, monkeypatch):
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "sitecustomize.py").write_text(SLOW)
    paths = [str(tmp_path / "slow"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    monkeypatch.setitem(deployment.ENVIRONMENT, "PYTHONPATH", os.pathsep.join(filter(None, paths)))
    slow = json.dumps({"links": LINKS, "read": READ})
    monkeypatch.setitem(deployment.ENVIRONMENT, "SLOW_LINKS", slow)

    federation = Deployment(tmp_path, CLIENTS)
    try:
        federation.begin()
        added = 0.0
        for name, deadline, kill in (("patient", 600, None), ("hasty", 65, 10)):
            expected, absent = simulated(tmp_path, name, deadline, kill, added)
            seconds, missed = measure(federation, name, deadline, kill)
            print(name, "simulated", expected, absent, "measured", seconds, missed, flush=True)
            assert missed == absent, name
            # In a run's first round devices load the base and read their text, too.
            for ours, theirs in zip(expected[1:], seconds[1:], strict=True):
                assert abs(ours - theirs) <= AGREE * theirs, (name, ours, theirs)
            added = max(0.0, seconds[1] - expected[1])
    finally:
        federation.end()


def measure(federation: Deployment, name: str, deadline: float, kill: float | None):
    """The same of a run over processes. kill: seconds in round 2 after which one is killed."""
    folder = federation.folder
    out = folder / f"{name}-real"
    watch = Watch(out / ".progress.jsonl")
    program = federation.run(written(folder, f"{name}-real", deadline), out.name)
    if kill is not None:
        wait(lambda: 1 in watch.ended, "the first round")
        time.sleep(kill)
        federation.devices[KILLED].process.kill()
        for pid in federation.pids():
            if f"home-{KILLED}" in str(deployment.cwd(pid)):
                os.kill(pid, signal.SIGKILL)
    assert program.code() == 0, program.said
    watch.over = True
    watch.join()
    # a round begins with its first question, which the first note of it follows at once
    seconds = [watch.ended[r] - watch.begun[r] for r in sorted(watch.ended)]
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return seconds, absences(lines)
