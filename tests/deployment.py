"""A true federation on the loopback, as the tests use it: the commands that an operator and owners
type, each a process, and what their runs must be equal to.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import load_file

from comigs import load_config
from comigs.app import api
from comigs.federation.bundle import read_bundle, write_bundle
from comigs.federation.operator.server import free_port
from tests.runs import ENVIRONMENT, TINY, write_text

PATIENCE = 600  # seconds for what takes a minute at most on a quiet machine
COMIGS = [sys.executable, "-P", "-m", "comigs"]


class Program:
    """A `comigs` command that runs, and what it has printed."""

    def __init__(self, folder, name, *words):
        self.file = folder / f"{name}.out"
        with self.file.open("a") as out:
            self.process = subprocess.Popen(
                [*COMIGS, *map(str, words)],
                cwd=folder,
                env=ENVIRONMENT,
                stdout=out,
                stderr=out,
                text=True,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.begin = self.file.stat().st_size

    @property
    def said(self):
        return self.file.read_text()[self.begin :]

    def says(self, words):
        """Wait until it has said that."""
        wait(lambda: words in self.said or self.process.poll() is not None, words)
        assert words in self.said, self.said

    def end(self, how=signal.SIGTERM):
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.code()

    def code(self):
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(self.said) from None


def wait(until, what=""):
    end = time.monotonic() + PATIENCE
    while not until():
        assert time.monotonic() < end, f"in vain for {what}"
        time.sleep(0.1)


def command_line(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode()
    except OSError:
        return ""


def cwd(pid):
    try:
        return Path(f"/proc/{pid}/cwd").readlink()
    except OSError:
        return Path()


class Deployment:
    """A federation with its server and clients, in a folder."""

    def __init__(self, folder, clients):
        self.folder, self.clients, self.port = folder, clients, free_port()
        self.federation = folder / "fed"
        self.server, self.between, self.devices = None, None, {}

    def begin(self, between=None):
        """Found it, invite, serve and join. between: made of the federation and its port, stands
        between devices and the gateway at a `port` of its own.
        """
        base = ("--base", "tiny-gpt2", "--dtype", "float32")
        self.comigs("federation", "init", "fed", "--port", self.port, *base)
        port = self.port
        if between is not None:
            self.between = between(self.federation, self.port)
            port = self.between.port
        for name in self.clients:
            self.comigs("federation", "invite", "fed", name, "--out", f"{name}.first.toml")
            bundle = read_bundle(self.folder / f"{name}.first.toml")
            through = bundle.model_copy(update={"address": f"127.0.0.1:{port}"})
            write_bundle(self.folder / f"{name}.toml", through)
            write_text(self.folder, name)
        self.serve()
        self.devices |= {name: self.join(name) for name in self.clients}
        for device in self.devices.values():
            device.says("is online")

    def comigs(self, *words):
        done = subprocess.run(
            [*COMIGS, *map(str, words)],
            cwd=self.folder,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def serve(self):
        self.server = Program(self.folder, "server", "federation", "server", "fed")
        self.server.says("is open at")

    def join(self, name):
        words = [
            "federation",
            "client",
            f"{name}.toml",
            "--text",
            name,
            "--home",
            f"home-{name}",
            "--threads",
            1,
        ]
        return Program(self.folder, name, *words)

    def config(self, name, clients, more="", rounds=2):
        """A config without text, and the same with it."""
        shared = TINY.partition("[[clients]]")[0].format(rounds=rounds)
        for text, suffix in (("", ""), ("text = '{}'", "-alone")):
            entries = "".join(f"[[clients]]\nname = '{c}'\n{text.format(c)}\n" for c in clients)
            # Who ends with the generalist alone has copies of it as specialists: these were sent.
            options = "[options]\nfinish = 'mixture'\n"
            written = f"{shared}[experts]\nspecialists = 1\n{options}{entries}{more}"
            (self.folder / f"{name}{suffix}.toml").write_text(written, encoding="utf-8")
        return self.folder / f"{name}.toml"

    def run(self, config, out):
        return Program(
            self.folder,
            out,
            "run",
            config,
            "--engine",
            "flower",
            "--federation",
            "fed",
            "--out",
            out,
        )

    def run_id(self, out):
        """What devices call a run."""
        wait((self.folder / out / ".run-id").exists, "the run's id")
        return (self.folder / out / ".run-id").read_text()

    def own_part(self, name, out):
        """A client's folder of a run, on its device."""
        return self.folder / f"home-{name}" / "runs" / self.run_id(out)

    def pids(self):
        """Processes that have to do with this folder."""
        pids = [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]
        return [
            pid
            for pid in pids
            if self.folder in (cwd(pid), *cwd(pid).parents) and pid != os.getpid()
        ]

    def pid(self, word, folder):
        """The one process at work in `folder` whose command line has this word."""
        (found,) = [
            pid
            for pid in self.pids()
            if word in command_line(pid) and cwd(pid) == self.folder / folder
        ]
        return found

    def end(self):
        for program in filter(None, (*self.devices.values(), self.server)):
            program.end()
        if self.between is not None:
            self.between.end()
        assert not self.pids(), "something was left running"


def in_process(deployment, name, clients, rounds=2):
    """The folder of the same run in one process."""
    written = deployment.config(name, clients, rounds=rounds)
    config = load_config(written.with_name(f"{name}-alone.toml"))
    folder = deployment.folder / f"{name}-run"
    before = os.getcwd()
    os.chdir(deployment.folder)
    try:
        api.run(config, folder)
    finally:
        os.chdir(before)
    return folder


def equal(deployment, out, alone, clients):
    """A run's own models, on the devices, are those of the run in one process, and so is its
    result.
    """
    for name in clients:
        ours = load_file(deployment.own_part(name, out) / "clients" / name / "personal.safetensors")
        theirs = load_file(alone / "clients" / name / "personal.safetensors")
        assert ours.keys() == theirs.keys() and all(
            bool((ours[key] == theirs[key]).all()) for key in ours
        ), name
    figures = [
        json.loads((run / "summary.json").read_text())["clients"]
        for run in (deployment.folder / out, alone)
    ]
    assert figures[0] == figures[1]
