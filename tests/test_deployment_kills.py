"""Parts of a true federation killed at random moments: what docs/deploy.md promises must hold.

Each kill comes at a random moment of a run (seeded): as early as the submission, in a round,
between rounds, at the end. Afterwards the owner or the operator does what the table in
docs/deploy.md says, and nothing else. A run that has come to its end is the run in one process, to
the bit.

    COMIGS_KILLS=10 pytest -m slow tests/test_deployment_kills.py -s

kills ten times each; COMIGS_SEED draws other moments.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time

import pytest

from tests.deployment import Deployment, Program, command_line, cwd, equal, in_process, wait

CLIENTS, ROUNDS = ("ann", "bob"), 4
KILLS, SEED = int(os.environ.get("COMIGS_KILLS", "2")), os.environ.get("COMIGS_SEED", "1")
LATEST = 12  # seconds after a round at which the kill comes at the latest; one takes about as long
STEADY = "[participation]\nmin_clients = 2\ndeadline = 600\n"  # whoever is missing is asked again
ON_DEVICE = {"supernode": "flower.supernode:main", "trainer": "trainer_main:main"}
ON_SERVER = {"superlink": "flower-superlink", "gateway": "gateway:main"}
PARTS = (*ON_DEVICE, *ON_SERVER, "executor", "run")


class Killed:
    """A federation in which runs are killed; `run` is the command that follows one, `out` its
    folder.
    """

    def __init__(self, deployment, alone):
        self.deployment, self.alone = deployment, alone
        self.run, self.out, self.runs, self.commands = None, None, 0, 0

    def go_on(self):
        """As the operator would: resume where there is an unfinished run, else begin one."""
        if self.out is not None and self.is_finished():
            self.finish()
        if self.out is None:
            self.runs += 1
            self.out = f"run-{self.runs}"
        self.commands += 1
        words = ("resume", self.out)
        if not (self.deployment.folder / self.out).exists():
            config = self.deployment.config("kills", CLIENTS, STEADY, ROUNDS)
            words = ("run", config, "--engine", "flower", "--federation", "fed", "--out", self.out)
        self.run = Program(self.deployment.folder, f"command-{self.commands}", *words)

    def round(self):
        """The last round that the run has committed."""
        checkpoint = self.deployment.folder / self.out / "checkpoint.json"
        return json.loads(checkpoint.read_text())["round"] if checkpoint.exists() else 0

    def wait_for(self, round, seconds):
        """Wait until a round is committed and some seconds have gone by, or the run has ended."""
        if self.run is not None and self.round() > round:
            self.finish()
        if self.run is None or self.run.process.poll() is not None:
            self.go_on()
        wait(lambda: self.round() >= round or self.run.process.poll() is not None, "a round")
        time.sleep(seconds)

    def is_finished(self):
        return (self.deployment.folder / self.out / "summary.json").exists()

    def finish(self):
        """Let the run come to its end; it is what it must be."""
        if not self.is_finished():
            if self.run.process.poll() is not None:
                self.go_on()
            assert self.run.code() == 0, self.run.said
        self.check_result()
        self.run, self.out = None, None

    def check_result(self):
        equal(self.deployment, self.out, self.alone, CLIENTS)
        folders = [self.deployment.folder / self.out, self.deployment.federation]
        folders += [self.deployment.own_part(name, self.out) for name in CLIENTS]
        left = [p for folder in folders for p in folder.rglob("*") if "unfinished" in p.name]
        assert not left, "something half-written was left"

    def begin_anew(self):
        """After a failure, end its run, which would lock the next test's; start what has ended."""
        self.run.process.kill()
        self.run.process.wait()
        self.deployment.server.end()
        wait(lambda: not self.processes(), "an end of all that the server started")
        self.deployment.serve()
        for name, device in self.deployment.devices.items():
            if device.process.poll() is not None:
                self.deployment.devices[name] = self.deployment.join(name)
                self.deployment.devices[name].says("is online")
        self.run, self.out = None, None

    def processes(self, *words):
        """The process ids of the server's folder whose command line has one of these words."""
        pids = [p for p in self.deployment.pids() if cwd(p) == self.deployment.federation]
        return [p for p in pids if not words or any(w in command_line(p) for w in words)]


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    deployment = Deployment(tmp_path_factory.mktemp("kills"), CLIENTS)
    try:
        deployment.begin()
        yield Killed(deployment, in_process(deployment, "kills", CLIENTS, ROUNDS))
    finally:
        deployment.end()


@pytest.fixture
def killed(federation):
    """The federation for one test, which leaves no run behind even where it fails."""
    yield federation
    if federation.run is not None:
        federation.begin_anew()


def kill_on_device(killed, part, draw):
    """Her command ends and says why; she starts it again, and nobody else does anything."""
    name = draw.choice(CLIENTS)
    device = killed.deployment.devices[name]
    os.kill(killed.deployment.pid(ON_DEVICE[part], f"home-{name}"), signal.SIGKILL)
    assert device.code() == 2 and f"{part} ended with code -9" in device.said, device.said
    home = killed.deployment.folder / f"home-{name}"
    wait(lambda: not [p for p in killed.deployment.pids() if cwd(p) == home], "an end of its parts")
    killed.deployment.devices[name] = killed.deployment.join(name)
    killed.deployment.devices[name].says("is online")


def kill_on_server(killed, part, draw):
    """The server's command ends and says why, and so does the run's; both are started again."""
    os.kill(killed.deployment.pid(ON_SERVER[part], "fed"), signal.SIGKILL)
    start_server_again(killed, part)


def start_server_again(killed, part):
    server = killed.deployment.server
    assert server.code() == 2 and f"{part} ended with code -9" in server.said, server.said
    code = killed.run.code()
    assert code == 2 or killed.is_finished(), killed.run.said
    wait(lambda: not killed.processes(), "an end of all that the server started")
    killed.deployment.serve()


def kill_executor(killed, part, draw):
    """Where the SuperExec is killed the server ends; where the ServerApp is, the run fails."""
    apps = killed.processes("flwr-serverapp")
    if apps and draw.random() < 0.7:
        os.kill(draw.choice(apps), signal.SIGKILL)
        code = killed.run.code()
        assert killed.deployment.server.process.poll() is None, killed.deployment.server.said
        assert (code == 2 and "comigs resume" in killed.run.said) or killed.is_finished()
        return
    os.kill(killed.processes("flower-superexec")[0], signal.SIGKILL)
    start_server_again(killed, "superexec")


def kill_run(killed, part, draw):
    """The run goes on by itself: the operator waits for it, or stops the server, and resumes."""
    killed.run.process.kill()
    killed.run.process.wait()
    checkpoint = killed.deployment.folder / killed.out / "checkpoint.json"
    submitted = "submitted as run" in killed.run.said
    if submitted and draw.random() < 0.5:
        wait(lambda: json.loads(checkpoint.read_text())["finished"], "the run's own end")
        return
    killed.deployment.server.end()
    wait(lambda: not killed.processes(), "an end of all that the server started")
    killed.deployment.serve()


@pytest.mark.slow  # about a minute a kill
@pytest.mark.parametrize("part", PARTS)
def test_a_part_killed_at_random_moments(killed, part):
    draw = random.Random(f"{SEED} {part}")
    kill = {"run": kill_run, "executor": kill_executor}
    for part_of, function in ((ON_DEVICE, kill_on_device), (ON_SERVER, kill_on_server)):
        kill |= dict.fromkeys(part_of, function)
    for number in range(KILLS):
        killed.wait_for(draw.randrange(ROUNDS + 1), draw.uniform(0, LATEST))
        before, said, began = killed.round(), killed.run.said.splitlines()[-1:], time.monotonic()
        kill[part](killed, part, draw)
        assert killed.round() >= before, "a whole round was lost"
        seconds = f"{time.monotonic() - began:.0f} s until all was there again"
        print(f"{part} {number + 1}: after round {before}, {said}; {seconds}", flush=True)
    killed.finish()
