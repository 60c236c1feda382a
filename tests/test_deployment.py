"""A true federation on the loopback: SuperLink, gateway, SuperNodes, TLS, keys. Every byte that
passes is kept.

The first tests share one run of two clients and take about two minutes in all on two cores. Those
that kill something and wait for the rest to notice take one to three minutes each: they are marked
slow.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import ssl
import threading
from contextlib import closing, suppress
from itertools import islice, zip_longest

import httpx
import pytest

from comigs.federation.bundle import read_bundle, write_bundle
from comigs.federation.operator.folder import Federation
from comigs.slots import Slot
from tests.deployment import Deployment, Program, command_line, cwd, equal, in_process, wait
from tests.device import require_unsaid
from tests.runs import write_text

CLIENTS = ("ann", "bob")
WINDOW = 48  # bytes; no two tensors or texts share so many by chance


class Recorder(threading.Thread):
    """A machine in the middle that has the server's key: keeps every byte, either way, as it is
    inside the TLS. Requests with the words `held` wait for as long as these are there; `holding`
    counts them.
    """

    def __init__(self, federation, target):
        super().__init__(daemon=True)
        self.target, self.directions, self.held, self.holding = target, [], None, 0
        self.server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.server_side.load_cert_chain(federation / "server.pem", federation / "server.key")
        self.client_side = ssl.create_default_context(cafile=federation / "ca.pem")
        self.listening = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.port = self.listening.getsockname()[1]
        self.start()

    def run(self):
        asyncio.run(self.serve())

    async def serve(self):
        self.loop, self.over = asyncio.get_running_loop(), asyncio.Event()
        async with await asyncio.start_server(
            self.connect, sock=self.listening, ssl=self.server_side
        ):
            await self.over.wait()

    @property
    def bytes(self):
        """All that was heard so far; each direction of each connection is one piece of it."""
        return self.heard_since([])

    def so_far(self):
        """How much was heard of each direction."""
        return [len(heard) for heard in list(self.directions)]

    def heard_since(self, lengths):
        """What was heard after `so_far` said that."""
        directions = zip_longest(list(self.directions), lengths, fillvalue=0)
        return b"".join(heard[length:] for heard, length in directions)

    def end(self):
        self.loop.call_soon_threadsafe(self.over.set)
        self.join()

    async def connect(self, reader, writer):
        try:
            gateway = await asyncio.open_connection("127.0.0.1", self.target, ssl=self.client_side)
        except OSError:
            writer.close()
        else:
            await asyncio.gather(self.keep(reader, gateway[1]), self.keep(gateway[0], writer))

    async def keep(self, reader, writer):
        heard = bytearray()
        self.directions.append(heard)
        with suppress(OSError):
            while piece := await reader.read(65536):
                heard += piece
                self.holding += bool(self.held) and self.held in piece
                while self.held and self.held in piece:
                    await asyncio.sleep(0.1)
                writer.write(piece)
                await writer.drain()
        writer.close()


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    made = Deployment(tmp_path_factory.mktemp("deployment"), CLIENTS)
    try:
        made.begin(Recorder)
        yield made
    finally:
        made.end()


class Copies(threading.Thread):
    """Keeps a copy of every private file that appears on a device, before a later round replaces
    it.
    """

    def __init__(self, folder):
        super().__init__()
        self.folder, self.kept, self.over = folder, {}, threading.Event()

    def run(self):
        while not self.over.wait(0.05):
            for path in self.folder.glob("home-*/runs/*/clients/*/*.safetensors"):
                if path not in self.kept:
                    with suppress(OSError):
                        self.kept[path] = path.read_bytes()


@pytest.fixture(scope="module")
def first(deployment):
    """The folder of a run that went well, with copies of what its devices held meanwhile."""
    copies = Copies(deployment.folder)
    copies.start()
    try:
        run = deployment.run(deployment.config("plain", CLIENTS), "first")
        assert run.code() == 0, run.said
    finally:
        copies.over.set()
        copies.join()
    return deployment.folder / "first", copies.kept


@pytest.fixture(scope="module")
def alone(deployment):
    """The same run in one process."""
    return in_process(deployment, "alone", CLIENTS)


@pytest.fixture(scope="module")
def pair_alone(deployment):
    """The same with the clients of the slow tests."""
    return in_process(deployment, "pair", CLIENTS)


def test_a_run_over_the_network_is_the_run_in_one_process(deployment, first, alone):
    equal(deployment, "first", alone, CLIENTS)


def test_the_operator_sees_who_is_there(deployment, first):
    said = deployment.comigs("federation", "status", "fed")
    lines = [
        line.split()
        for line in said.splitlines()
        if line.split()[:1] and line.split()[0] in CLIENTS
    ]
    assert [line[0] for line in lines] == list(CLIENTS)
    assert all(line[3:] == ["yes", "yes", "now", "1"] for line in lines)


def windows(raw):
    """A few pieces of some bytes that, found elsewhere, prove that these were there: not of zeros
    and the like.
    """
    pieces = (raw[at : at + WINDOW] for at in range(0, len(raw) - WINDOW, WINDOW))
    return set(islice((piece for piece in pieces if len(set(piece)) > 12), 6))


def test_no_specialist_router_or_text_leaves_a_device(deployment, first):
    """Not over the network, and not onto the server's disk."""
    run, copies = first
    server = [
        path
        for folder in (run, deployment.federation)
        for path in folder.rglob("*")
        if path.is_file()
    ]
    heard = deployment.between.bytes
    seen = heard + b"".join(path.read_bytes() for path in server)
    checked = dict.fromkeys(("specialist", "router", "generalist", "rest", "attention"), 0)
    for path, raw in copies.items():
        for key, tensor in load_tensors(raw).items():
            role, pieces = role_of(key), windows(tensor)
            if ".optimizer." in path.name or role in ("specialist", "router"):
                found = sum(piece in seen for piece in pieces)
                assert found == 0, f"{key} of {path.name} was seen"
                checked[role] += len(pieces)
            else:
                checked[role] += sum(piece in heard for piece in pieces)
    assert min(checked.values()) > 20, (
        checked
    )  # there was something to find, and what is there is found
    for name in CLIENTS:
        texts = [path.read_text(encoding="utf-8") for path in (deployment.folder / name).iterdir()]
        assert not [
            t for t in texts for at in range(0, len(t) - 20, 20) if t[at : at + 20].encode() in seen
        ]
        stores = [
            p for p in (deployment.folder / f"home-{name}" / "cache").rglob("*") if p.is_file()
        ]
        assert stores and not [
            path for path in stores for piece in windows(path.read_bytes()) if piece in seen
        ]
        key = read_bundle(deployment.folder / f"{name}.toml").key.splitlines()[2]
        assert key.encode() not in seen


PRIVATE = """\
[privacy]
level = "document"
delta = 0.01
expected_batch = 2
noise_multiplier = 1.0
"""


@pytest.mark.slow  # a run
def test_with_privacy_no_figure_of_a_text_is_in_any_byte_at_the_front(deployment):
    before = deployment.between.so_far()
    run = deployment.run(deployment.config("private", CLIENTS, PRIVATE), "private")
    assert run.code() == 0, run.said
    heard = deployment.between.heard_since(before)
    assert b"safetensors" in heard or b"g0.A" in heard  # what is sent is among it
    for name in CLIENTS:
        require_unsaid(deployment.own_part(name, "private"), heard)


def role_of(key):
    """What a tensor of a client's state is; its optimisers' are SLOT/MOMENT, and their counts the
    router's affair.
    """
    slot = key.partition("/")[0]
    return Slot.parse(slot).role if "." in slot else "router"


def load_tensors(raw):
    """The bytes of each tensor of a safetensors file."""
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    places = {key: entry["data_offsets"] for key, entry in header.items() if key != "__metadata__"}
    return {key: raw[8 + size + begin : 8 + size + end] for key, (begin, end) in places.items()}


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/list-runs",
        "/v1/control/start-run",
        "/v1/runtime/acquire-task",
        "/v1/fleet/register-node",
    ],
)
def test_from_outside_only_what_devices_need_answers(deployment, path):
    context = ssl.create_default_context(cafile=deployment.federation / "ca.pem")
    at, headers = f"https://127.0.0.1:{deployment.port}", {"content-type": "application/protobuf"}
    with httpx.Client(verify=context, trust_env=False, base_url=at, headers=headers) as stranger:
        assert stranger.post(path).status_code == 404
        assert stranger.post("/v1/fleet/pull-messages").status_code == 401


def test_a_second_server_and_a_second_device_are_refused(deployment):
    for name, words, problem in (
        ("server-2", ("federation", "server", "fed"), "its server is running already"),
        (
            "ann-2",
            ("federation", "client", "ann.toml", "--text", "ann", "--home", "home-ann"),
            "runs already",
        ),
    ):
        second = Program(deployment.folder, name, *words)
        assert second.code() == 2 and problem in second.said and second.said.count("\n") == 1


@pytest.mark.slow  # two starts of a device
def test_a_revoked_device_is_put_out_and_stays_out(deployment):
    """And one with its bundle but another folder never gets in."""
    deployment.comigs("federation", "invite", "fed", "eve", "--out", "eve.toml")
    write_text(deployment.folder, "eve")
    eve = deployment.join("eve")
    eve.says("is online")
    deployment.comigs("federation", "revoke", "fed", "eve")
    assert eve.code() == 2 and "does not know this device's key any more" in eve.said
    shutil.rmtree(deployment.folder / "home-eve")
    again = deployment.join("eve")
    assert again.code() == 2 and "does not let this device in" in again.said
    assert '"eve" is online' not in again.said


# What is killed: slow, for all that is left has to notice


STEADY = "[participation]\nmin_clients = 2\ndeadline = 600\n"  # whoever is missing is asked again
ENDED = "has ended: dropped"  # of a run, in the log of a SuperNode


@pytest.mark.slow  # a minute for the run, half of one for the restart
def test_a_device_killed_at_work_goes_on_where_it_was(deployment, pair_alone):
    run = deployment.run(deployment.config("killed", CLIENTS, STEADY), "killed")
    ann = deployment.devices["ann"]
    ann.says(f"{deployment.run_id('killed')}: round 1 of 2: trained and answered")
    os.kill(deployment.pid("flower.supernode:main", "home-ann"), signal.SIGKILL)
    assert ann.code() == 2 and "supernode ended with code -9" in ann.said
    deployment.devices["ann"] = deployment.join("ann")
    deployment.devices["ann"].says("is online")  # else the run would wait for her in vain
    assert run.code() == 0, run.said
    equal(deployment, "killed", pair_alone, CLIENTS)


@pytest.mark.slow  # two runs' time and two starts of the server
def test_a_server_killed_at_work_is_started_again_and_the_run_resumed(deployment, pair_alone):
    run = deployment.run(deployment.config("crashed", CLIENTS, STEADY), "crashed")
    run.says("round 1/2")
    os.kill(deployment.pid("flower-superlink", "fed"), signal.SIGKILL)
    assert (
        deployment.server.code() == 2 and "superlink ended with code -9" in deployment.server.said
    )
    assert run.code() == 2 and "the server has stopped" in run.said and "comigs resume" in run.said
    early = Program(deployment.folder, "early", "resume", "crashed")
    assert early.code() == 2
    deployment.serve()
    wait(
        lambda: not [pid for pid in deployment.pids() if "flwr-serverapp" in command_line(pid)],
        "the old ServerApp",
    )
    again = Program(deployment.folder, "again", "resume", "crashed")
    assert again.code() == 0, again.said
    equal(deployment, "crashed", pair_alone, CLIENTS)


@pytest.mark.slow  # as above
def test_a_run_stopped_by_hand_is_resumed(deployment, pair_alone):
    run = deployment.run(deployment.config("stopped", CLIENTS, STEADY), "stopped")
    run.says("round 1/2")
    assert run.end() == 130 and "comigs resume stopped" in run.said
    again = Program(deployment.folder, "again", "resume", "stopped")
    assert again.code() == 0, again.said
    equal(deployment, "stopped", pair_alone, CLIENTS)


@pytest.mark.slow  # two runs' time
def test_a_run_that_ends_before_a_device_can_confirm_its_message_costs_no_later_answer(
    deployment, pair_alone
):
    """The next run gets its own answer, long before its deadline."""
    deployment.between.held = b"/v1/fleet/confirm-message-received"
    run = deployment.run(deployment.config("held", CLIENTS, STEADY), "held")
    wait(lambda: deployment.between.holding == len(CLIENTS), "a confirmation of each")
    assert run.end() == 130, run.said
    logs = [deployment.folder / f"home-{name}" / "log" / "supernode.log" for name in CLIENTS]
    before = {log: log.read_text().count(ENDED) for log in logs}
    deployment.between.held = None
    wait(lambda: all(log.read_text().count(ENDED) > n for log, n in before.items()), ENDED)
    again = Program(deployment.folder, "again", "resume", "held")
    assert again.code() == 0, again.said
    equal(deployment, "held", pair_alone, CLIENTS)


@pytest.mark.slow  # two starts of the server and a run
def test_an_app_that_was_not_pinned_is_not_run(deployment):
    """Her device ends; the others go on without her."""
    deployment.comigs("federation", "invite", "fed", "fay", "--out", "fay.first.toml")
    other = read_bundle(deployment.folder / "fay.first.toml").model_copy(update={"app": "0" * 64})
    write_bundle(deployment.folder / "fay.toml", other)
    write_text(deployment.folder, "fay")
    fay = deployment.join("fay")
    fay.says("is online")
    run = deployment.run(deployment.config("pinned", ("ann", "fay")), "pinned")
    assert fay.code() == 2 and "nothing of it was run" in fay.said
    assert not list((deployment.folder / "home-fay" / "runs").iterdir())
    run.says("fay  absent")
    run.end()


@pytest.mark.slow  # a start of the server, and two of devices
def test_who_was_revoked_while_the_server_was_down_stays_out(deployment):
    deployment.devices.pop("bob").end()
    deployment.server.end()
    deployment.comigs("federation", "revoke", "fed", "bob")
    deployment.serve()
    bob = deployment.join("bob")
    assert bob.code() == 2 and "does not let this device in" in bob.said


@pytest.mark.slow  # a start of the server
def test_a_server_killed_leaves_nothing_behind(deployment):
    """The command itself, not one of its programs: nobody is left to tell them."""
    os.kill(deployment.server.process.pid, signal.SIGKILL)
    deployment.server.process.wait()
    wait(
        lambda: not [pid for pid in deployment.pids() if cwd(pid) == deployment.federation],
        "an end",
    )
    assert not Federation.open(deployment.federation).running
    with closing(socket.socket()) as probe:
        assert probe.connect_ex(("127.0.0.1", deployment.port)) != 0
    deployment.serve()
