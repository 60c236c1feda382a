"""Rounds that survive: devices raise, hang, vanish, come back and lie, the server dies, and nothing
private leaves.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file

from comigs.app import api
from comigs.errors import UserError
from comigs.federation import messages
from comigs.federation.flower.engine import FederatedRun, Flower
from comigs.federation.messages import ANSWERS, REQUESTS, Refusal
from comigs.methods.loading import load_method
from comigs.runs.folder import RunFolder
from comigs.server import wire
from comigs.slots import SPELLING, Slot
from tests.conftest import WORDS, run_config, same, until
from tests.local_grid import FIRST_NODE, Federation, TestTrainer, events

NAMES = ("ada", "bob")
ROOM = 1 << 26
ADA, BOB = FIRST_NODE, FIRST_NODE + 1


class Told(TestTrainer):
    """Does something of a test's before it answers an exchange: `on[round]`, once."""

    def __init__(self, *given):
        super().__init__(*given)
        self.on = {}

    def before(self, raw):
        request, _ = wire.unpack(raw, REQUESTS, ROOM)
        return self.on.pop(request.round, lambda raw: None)(raw)


@pytest.fixture
def federation(tmp_path):
    run_config(tmp_path / "text", " ".join(NAMES))
    return Federation(tmp_path / "federation", NAMES, tmp_path / "text", Told)


def configured(federation, **tree):
    weights = {name: {"weight": 1.0} for name in federation.names}
    text = federation.root.parent / "text"
    return run_config(text, " ".join(federation.names), weights, **{"rounds": 3, **tree})


@pytest.fixture
def undisturbed(tmp_path):
    """The same config in-process."""
    return lambda config: api.run(config, tmp_path / "in-process")


def equal(folder, out, federation):
    """A run on the server and its devices is what it would have been without any trouble, to the
    bit.
    """
    assert (folder.path / "metrics.jsonl").read_bytes() == (out / "metrics.jsonl").read_bytes()
    for name in federation.names:
        own = RunFolder.open(federation.device_run(name))
        assert same(folder.load(f"clients/{name}/personal"), own.load(f"clients/{name}/personal"))
    return True


@contextmanager
def around(round, do):
    """Call `do` before the exchange of that round, once."""
    real, left = Flower.exchange, [round]

    def exchange(self, tasks, downloads):
        if left and next(iter(tasks.values())).round == left[0]:
            left.pop()
            do()
        return real(self, tasks, downloads)

    with patch.object(Flower, "exchange", exchange):
        yield


def absent(out):
    lines = RunFolder.open(out).metrics()
    return [(line.round, line.client, line.reason) for line in lines if line.kind == "absent"]


def trained(out):
    lines = RunFolder.open(out).metrics()
    return [(line.round, line.client) for line in lines if line.kind == "train"]


def notes(out):
    return [event["message"] for event in events(out) if event["kind"] == "note"]


def test_the_server_app_runs_a_run(federation, tmp_path, undisturbed):
    config, out = configured(federation, rounds=1), tmp_path / "run"
    federation.create(out, config)
    federation.go_on_as_app(out, federation.grid())
    assert equal(undisturbed(config), out, federation)
    written = [line.as_json() for line in RunFolder.open(out).metrics()]
    assert [e for e in events(out) if e["kind"] != "note"] == written
    assert "round 1: 0 of 2 in, waiting for ada, bob (0 s)" in notes(out)


def test_of_an_error_the_server_learns_the_type_and_nothing_else(federation, tmp_path):
    def fail(event):
        raise ValueError(f"secret {tmp_path} cloud tree")

    federation.trainers["bob"].report = fail
    out, config = tmp_path / "run", configured(federation, participation={"max_failures": 2})
    grid = federation.run(out, config)
    assert absent(out) == [(1, "bob", "failed: ValueError"), (2, "bob", "failed: ValueError")]
    assert not any(
        what in raw for raw in grid.seen for what in (b"secret", str(tmp_path).encode(), b"cloud")
    )
    assert any("secret" in line and "Traceback" in line for line in federation.said["bob"])
    assert {name for _, name in trained(out)} == {"ada"}
    assert "secret" not in (out / ".progress.jsonl").read_text()


def test_without_a_trainer_a_client_is_absent(federation, tmp_path):
    config, out = configured(federation, participation={"max_failures": 1}), tmp_path / "run"
    federation.create(out, config)
    grid = federation.grid()
    grid.trainers[BOB] = tmp_path / "nothing"
    federation.go_on(out, grid)
    assert absent(out) == [(1, "bob", "no trainer there")]


def hanging(federation, client, round, rounds):
    """A gate at which the client waits in that round, and what opens it and waits until it has
    answered.
    """
    gate = threading.Event()
    federation.trainers[client].on[round] = lambda raw: gate.wait(60) and None

    def release():
        gate.set()
        until(
            lambda: any(
                f"round {round} of {rounds}: trained" in line for line in federation.said[client]
            )
        )

    return release


@pytest.mark.slow  # it waits
@pytest.mark.parametrize("method", ["flora", "comigs"])
def test_one_that_hangs_is_not_waited_for_and_comes_late(federation, tmp_path, method):
    """flora: nothing that was merged into the base is merged again, nothing is left out."""
    out, config = (
        tmp_path / "run",
        configured(federation, rounds=5, method=method, participation={"deadline": 6}),
    )
    with around(4, hanging(federation, "bob", 2, 5)):
        federation.run(out, config)
    assert absent(out) == [
        (2, "bob", "no answer by the deadline"),
        (3, "bob", "busy with round 2"),
        (2, "bob", "too late, in round 4: dropped"),
    ]
    assert [round for round, name in trained(out) if name == "bob"] == [1, 4, 5]
    assert "round 2: 1 of 2 in, waiting for bob (" in "".join(notes(out))
    if method == "flora":
        models = [RunFolder(federation.device_run(n)).load(f"clients/{n}/personal") for n in NAMES]
        merged = [name for name in models[0] if name.endswith("merged.W")]
        assert merged and all(
            torch.allclose(models[0][name], models[1][name], atol=1e-6) for name in merged
        )
        assert all(float(models[0][name].abs().max()) > 1e-4 for name in merged)


@pytest.mark.slow  # it waits for what comes late
@pytest.mark.parametrize("format", ["float32", "int8"])
def test_what_comes_late_may_count_for_less(federation, tmp_path, format):
    """In int8 it is a step from the download of its own round, which the server has kept."""
    patience = {"deadline": 6, "late": "discount", "late_discount": 0.5}
    config = configured(
        federation, rounds=4, method="fedavg", participation=patience, upload={"format": format}
    )
    out, first, second = (
        tmp_path / "run",
        hanging(federation, "bob", 2, 4),
        hanging(federation, "bob", 3, 4),
    )
    with around(3, first), around(4, second):
        federation.run(out, config)
    assert [round for round, name in trained(out) if name == "bob"] == [
        1,
        2,
        4,
    ]  # what came late counted in round 3
    assert [line for line in absent(out) if "late" not in line[2]] == [
        (2, "bob", "no answer by the deadline"),
        (3, "bob", "no answer by the deadline"),
    ]


def test_one_that_vanishes_is_gone_and_welcome_back(federation, tmp_path):
    """What it had done when it went is not lost on it: it answers that first."""
    config, out = configured(federation, rounds=4), tmp_path / "run"
    federation.create(out, config)
    grid = federation.grid()
    federation.trainers["bob"].on[2] = lambda raw: grid.offline.add(BOB)

    def back():
        until(lambda: any("round 2 of 4: trained" in line for line in federation.said["bob"]))
        grid.offline.discard(BOB)

    with around(3, back):
        federation.go_on(out, grid)
    assert absent(out) == [(2, "bob", "gone"), (2, "bob", "too late, in round 3: dropped")]
    assert [round for round, name in trained(out) if name == "bob"] == [1, 3, 4]


def test_one_that_is_revoked_and_invited_again_is_reached_in_the_same_run(
    federation, tmp_path, undisturbed
):
    """It has another key then, and another node: where the run looked for it, nobody was."""
    config, out, new = configured(federation), tmp_path / "run", BOB + 8
    federation.create(out, config)
    grid, file = federation.grid(), federation.root / "clients.json"
    grid.add_node(new, grid.trainers[BOB])
    grid.offline.add(new)

    def replace():
        clients = json.loads(file.read_text())
        del clients["bob"]
        file.write_text(json.dumps(clients))
        grid.offline ^= {BOB, new}
        invited = {"node_id": None, "public_key": "-"}
        file.write_text(json.dumps(clients | {"bob": invited}))
        file.write_text(json.dumps(clients | {"bob": invited | {"node_id": new}}))

    with around(2, replace):
        federation.go_on(out, grid)
    assert absent(out) == [] and equal(undisturbed(config), out, federation)


def test_one_that_is_killed_and_started_again_is_asked_again_in_the_same_round(
    federation, tmp_path, undisturbed
):
    config, out = configured(federation), tmp_path / "run"
    federation.create(out, config)
    grid = federation.grid()
    federation.trainers["bob"].on[2] = lambda raw: grid.restart(BOB)
    federation.go_on(out, grid)
    assert any("answered in round 2 is sent again" in line for line in federation.said["bob"])
    assert equal(undisturbed(config), out, federation)


@pytest.mark.parametrize("when", ["before they are asked", "while they are at work"])
@pytest.mark.few(1)
def test_with_all_clients_gone_it_waits_says_so_and_goes_on(
    federation, tmp_path, undisturbed, when
):
    config, out = configured(federation), tmp_path / "run"
    federation.create(out, config)
    grid = federation.grid()

    def gone(raw=b""):
        grid.offline |= {ADA, BOB}
        threading.Timer(1.5, grid.offline.clear).start()

    if when == "before they are asked":
        with around(2, gone):
            federation.go_on(out, grid)
    else:
        federation.trainers["ada"].on[2] = gone
        federation.go_on(out, grid)
    assert any(
        re.match(r"round 2: nobody can be asked yet, waiting for ada, bob \(\d s\)", note)
        for note in notes(out)
    )
    assert any(e.get("say") for e in events(out))
    assert equal(undisturbed(config), out, federation)


@pytest.mark.parametrize(
    ("tree", "round"),
    [
        ({}, 4),
        ({"upload": {"format": "int8"}}, 3),
        ({}, 1),
        ({"method": "flora"}, 3),
        ({"method": "pcl"}, 2),
    ],
    ids=str,
)
@pytest.mark.few(1)
def test_the_server_may_die_before_it_has_kept_a_round(federation, tmp_path, tree, round):
    """It asks again, the devices say again what they said, and the result is that of a run nobody
    disturbed.
    """
    config, whole, died = configured(federation, **tree), tmp_path / "whole", tmp_path / "died"
    federation.run(whole, config)
    federation.create(died, config)
    commit = RunFolder.commit

    def die(self, number, *given, **how):
        if self.path == died and number + how.get("finished", False) == round:
            raise KeyboardInterrupt
        return commit(self, number, *given, **how)

    with patch.object(RunFolder, "commit", die), pytest.raises(KeyboardInterrupt):
        federation.go_on(died, federation.grid())
    count = sum(map(len, federation.said.values()))
    federation.go_on(died, federation.grid())
    assert sum(map(len, federation.said.values())) > count
    assert (whole / "metrics.jsonl").read_bytes() == (died / "metrics.jsonl").read_bytes()
    for name in NAMES:
        runs = [
            federation.root / "devices" / name / "runs" / (out / ".run-id").read_text()
            for out in (whole, died)
        ]
        assert same(*(load_file(run / "clients" / name / "personal.safetensors") for run in runs))
        assert len({(run / "metrics.jsonl").read_bytes() for run in runs}) == 1


@pytest.mark.slow  # a run for each format
def test_what_travels_is_as_large_as_its_format(federation, tmp_path):
    sizes = {}
    for format in ("float32", "bfloat16", "int8"):
        config = configured(
            federation,
            upload={"format": format},
            experts={"rank": 64},
            evaluation={"every": 0, "keep": "last"},
        )
        seen = federation.run(tmp_path / format, config).seen
        answers = [
            raw for raw in seen if b'\\"kind\\":\\"answered\\"' in raw and b'\\"round\\":3' in raw
        ]
        sizes[format] = min(len(raw) for raw in answers) - 3000
    assert sizes["bfloat16"] < 0.6 * sizes["float32"] and sizes["int8"] < 0.45 * sizes["float32"]
    personal = [RunFolder.open(tmp_path / f).metrics()[-1].nats_per_token for f in sizes]
    assert personal == pytest.approx([personal[0]] * 3, rel=5e-3)


def changed(tensor=lambda name, t: t, head=lambda head: {}, more=None, raw=lambda raw: raw):
    """A lie: the honest answer, with its tensors, head or bytes changed."""

    def lie(honest):
        answer, tensors = wire.unpack(honest, ANSWERS, ROOM)
        kept = {name: made for name, t in tensors.items() if (made := tensor(name, t)) is not None}
        return raw(wire.pack(answer.model_copy(update=head(answer)), kept | (more or {})))

    return lie


def line_of(**changes):
    return changed(head=lambda head: {"metrics": [line | changes for line in head.metrics]})


FIRST = "0.down.g0.A"
VERSIONS = "comigs 0.1.0 here, 9.9.9 there"
LIES = {  # what the liar does, one a round -> what the server makes of it
    "NaN": (changed(lambda name, t: t * float("nan")), "its upload is not finite in "),
    "infinite": (changed(lambda name, t: t / 0), "its upload is not finite in "),
    "huge": (changed(lambda name, t: t * 1e6), "a step of length "),
    "sign-flipped": (changed(lambda name, t: -t), "a step of length "),
    "another shape": (
        changed(lambda name, t: t.T.clone() if name == FIRST else t),
        "its upload has 0.down.g0.A as ",
    ),
    "one number": (changed(lambda name, t: t[:1, :1].clone()), "its upload has "),
    "another dtype": (changed(lambda name, t: t.to(torch.float64)), "its upload has "),
    "something missing": (
        changed(lambda name, t: None if name == FIRST else t),
        "its upload has no 0.down.g0.A",
    ),
    "something private": (
        changed(more={"0.down.s0.A": torch.ones(2, 2)}),
        "its upload has 1 tensors that were ",
    ),
    "noise": (
        changed(raw=lambda raw: b"\x80\x04K\x01." * 100),
        "a message whose header is longer than allowed",
    ),
    "half a message": (changed(raw=lambda raw: raw[: len(raw) // 2]), "a "),
    "a long message": (changed(raw=lambda raw: raw + b" " * (5 << 20)), "a message of "),
    "another run": (
        changed(head=lambda head: {"run": "another-run-00"}),
        "answered in another run",
    ),
    "a round to come": (
        changed(head=lambda head: {"round": head.round + 1}),
        "answered something else",
    ),
    "a round long past": (changed(head=lambda head: {"round": 1}), "answered something else"),
    "nothing trained": (
        changed(lambda name, t: None, lambda head: {"trained": False}),
        "answered something else",
    ),
    "metrics of another": (line_of(client="ada"), "metrics of something else"),
    "metrics that are text": (
        line_of(learning_rate="<script>"),
        "metrics that are not as they should be",
    ),
    "no metrics": (changed(head=lambda head: {"metrics": []}), "metrics of something else"),
    "another version": (lambda raw: wire.pack(Refusal(code="version", comigs="9.9.9")), VERSIONS),
    "an error": (
        lambda raw: wire.pack(Refusal(code="failed", comigs="1", error="OSError")),
        "failed: OSError",
    ),
}


class Liar(Told):
    """dan tells the server a lie whenever it has answered a new round, from the second on."""

    def __init__(self, *given):
        super().__init__(*given)
        self.lies = [lie for lie, _ in LIES.values()]

    def answer(self, raw):
        (request, _), honest = wire.unpack(raw, REQUESTS, ROOM), super().answer(raw)
        (answer, _), is_liar = wire.unpack(honest, ANSWERS, ROOM), self.device.name == "dan"
        new = answer.round == request.round > 1
        return self.lies.pop(0)(honest) if is_liar and self.lies and new else honest


def test_whatever_a_liar_sends_is_named_left_out_and_the_run_goes_on(tmp_path):
    """Where its bytes could not be read, it is asked for that answer once more before it is asked
    anything new.
    """
    names, rounds = ("ada", "bob", "dan"), len(LIES) + 2
    run_config(tmp_path / "text", " ".join(names))
    federation = Federation(tmp_path / "federation", names, tmp_path / "text", Liar)
    tree = {
        "participation": {"max_failures": 99},
        "client": {"steps": 1, "router_steps": 0},
        "evaluation": {"every": 0, "keep": "last"},
    }
    out = tmp_path / "run"
    federation.run(out, configured(federation, rounds=rounds, **tree))
    assert {name for _, name, _ in absent(out)} == {"dan"}
    given = [why for _, _, why in absent(out) if not why.startswith("too late")]
    for (what, (_, why)), reason in zip(LIES.items(), given, strict=True):
        assert reason.startswith(why) and "\n" not in reason and "<script>" not in reason, what
    last = RunFolder.open(out).metrics()[-1]
    assert {name for round, name in trained(out) if round == rounds} == set(names)
    assert last.kind == "evaluation" and last.nats_per_token < 8


def revoked_in_round_two(federation, out, config):
    """A run that stopped in round 2, and bob was revoked."""
    federation.create(out, config)
    commit, file = RunFolder.commit, federation.root / "clients.json"

    def die(self, number, *given, **how):
        if self.path == out and number == 2:
            raise KeyboardInterrupt
        return commit(self, number, *given, **how)

    with patch.object(RunFolder, "commit", die), pytest.raises(KeyboardInterrupt):
        federation.go_on(out, federation.grid())
    file.write_text(
        json.dumps({name: e for name, e in json.loads(file.read_text()).items() if name != "bob"})
    )


def test_a_run_goes_on_without_a_client_that_was_revoked(federation, tmp_path):
    out = tmp_path / "run"
    revoked_in_round_two(federation, out, configured(federation))
    federation.go_on(out, federation.grid())
    assert RunFolder.open(out).checkpoint().finished
    assert {name for round, name in trained(out) if round > 1} == {"ada"}
    assert {name for _, name, _ in absent(out)} == {"bob"}


def test_an_answer_may_have_a_figure_for_each_step_that_was_asked_for(federation, tmp_path):
    """Of long rounds each answer had been refused, after the training."""
    steps = 100_000
    long, short = (configured(federation, client={"steps": n}) for n in (steps, 1))
    shapes = {Slot.parse("0.down.g0.A"): (2, 2)}
    figures = torch.rand(steps, dtype=torch.float64).tolist()
    head = messages.Answered(
        run="run-0123456789ab",
        round=1,
        trained=True,
        metrics=[{"train_nats_per_token_by_step": figures}],
        timing={},
    )
    raw = wire.pack(head)
    assert len(raw) > 1 << 20
    for config, takes in ((long, True), (short, False)):
        folder = federation.create(tmp_path / str(takes), config)
        run = FederatedRun(head.run, config, load_method(config), "", {"ada": shapes})
        engine = Flower(run, folder, None)
        if takes:
            assert engine.opened(raw, "ada") == (head, {})
        else:
            with pytest.raises(wire.WireError, match="header is longer than allowed"):
                engine.opened(raw, "ada")


@pytest.mark.timeout(60)  # it waited without end
def test_a_run_that_needs_a_client_that_was_revoked_does_not_wait_for_it(federation, tmp_path):
    out = tmp_path / "run"
    config = configured(federation, participation={"min_clients": 2})
    revoked_in_round_two(federation, out, config)
    with pytest.raises(UserError, match=r"1 of 2 clients are left out.*bob: not invited any more"):
        federation.go_on(out, federation.grid())


@pytest.mark.timeout(60)  # it waited without end
def test_a_round_whose_clients_are_away_asks_others_that_are_online(federation, tmp_path):
    """One is drawn for each round: ada, bob who is never there, and ada. At the end nobody but ada
    can be asked, who is waited for though bob is online, whom nobody asks any more.
    """
    tree = {"seed": 49, "participation": {"clients_per_round": 1, "max_failures": 2}}
    out, config = tmp_path / "run", configured(federation, **tree)
    federation.create(out, config)
    grid = federation.grid()
    grid.offline.add(BOB)

    def swap():
        grid.offline = {ADA}
        threading.Timer(1.5, grid.offline.clear).start()

    with around(4, swap):
        federation.go_on(out, grid)
    assert RunFolder.open(out).checkpoint().finished and trained(out) == [
        (round, "ada") for round in (1, 2, 3)
    ]
    assert absent(out) == [(2, "bob", "gone")]


def test_a_version_that_differs_is_named_on_both_sides(federation, tmp_path):
    """A device that has another comigs checks by its own version, and says it."""
    out, refusal = tmp_path / "run", messages.refusal

    def refused(*given, **named):
        return refusal(*given, **named).model_copy(update={"comigs": "9.9.9"})

    own = "comigs.federation.device.received.our_version"
    says = patch.object(messages, "refusal", refused)
    with patch(own, lambda: "9.9.9"), says, pytest.raises(UserError, match="too few"):
        federation.run(out, configured(federation, participation={"max_failures": 1}))
    assert "the server has comigs 0.1.0, this device 9.9.9" in federation.said["bob"][0]
    assert any("comigs 0.1.0 here, 9.9.9 there" in json.dumps(event) for event in events(out))


def test_what_a_federation_cannot_do_is_said_before_anything_runs(federation, tmp_path):
    for tree, said in (
        ({"method": "centralized"}, "trains on the text of all clients in one place"),
        ({"data": {"distribution": "out"}}, "has only its own"),
    ):
        out = tmp_path / said[:5]
        with pytest.raises(UserError, match=said):
            federation.run(out, configured(federation, **tree))
        assert events(out)[-1]["kind"] == "error"
    out = tmp_path / "stranger"
    (federation.root / "clients.json").write_text('{"ada": {"node_id": 1}}')
    with pytest.raises(UserError, match="no client 'bob'"):
        federation.run(out, configured(federation))
    assert not any(federation.said.values())


def test_nothing_private_is_in_any_byte_of_any_message(federation, tmp_path):
    """All that goes either way is looked through for slots, tensors, moments, text and tokens of
    every round.
    """
    # Who ends with the generalist alone has copies of it as specialists, and that was sent.
    options, experts = {"finish": "mixture"}, {"specialists": 2, "rank": 4}
    config, out = configured(federation, experts=experts, options=options), tmp_path / "run"
    states, real = [], Flower.exchange

    def exchange(self, tasks, downloads):
        answers = real(self, tasks, downloads)
        states.extend(
            path.read_bytes()
            for path in federation.root.glob("devices/*/runs/*/clients/*/*.safetensors")
        )
        return answers

    with patch.object(Flower, "exchange", exchange):
        seen = b"".join(federation.run(out, config).seen)
    slots = {
        Slot.parse(found.group().decode()) for found in re.finditer(SPELLING.pattern.encode(), seen)
    }
    assert {slot.role for slot in slots} == {"generalist", "attention"}
    pieces = {True: set(), False: set()}
    nothing = TypeAdapter(dict)
    for raw in states:
        size = int.from_bytes(raw[:8], "little")
        for name, entry in nothing.validate_json(raw[8 : 8 + size]).items():
            if name != "__metadata__" and len(entry["shape"]) == 2:
                start, end = entry["data_offsets"]
                row = raw[8 + size + start : 8 + size + end][:16]
                shared = name.count("/") == 0 and Slot.parse(name).role in (
                    "generalist",
                    "attention",
                    "rest",
                )
                pieces[shared].add(row)
    pieces[False] -= {bytes(16)}
    assert (
        len(pieces[False]) > 100 and sum(row in seen for row in pieces[True]) > 20
    )  # it would be seen
    assert not [row for row in pieces[False] if row in seen]
    for name in NAMES:
        for word in WORDS[name].split():
            assert word.encode() not in seen or word in (
                "table",
                "little",
                "note",
            )  # words of ours, too
        for store in federation.root.glob(f"devices/{name}/cache/*/tokens.bin"):
            tokens = np.fromfile(store, dtype="<u2")
            for start in range(0, len(tokens) - 12, 12):
                assert tokens[start : start + 12].tobytes() not in seen
                assert tokens[start : start + 12].astype("<i8").tobytes() not in seen
    assert str(tmp_path).encode() not in seen
    assert not list(out.glob("clients/*"))


def test_an_app_ends_with_the_process_that_started_it():
    app = (
        "apps.GRACE = 0; apps.end_with_superexec(); print(os.getpid(), flush=True); time.sleep(600)"
    )
    app = f"import os, time; from comigs.federation.flower import apps; {app}"
    starter = (
        "import subprocess, sys; subprocess.Popen([sys.executable, '-c', "
        "sys.argv[1]]); sys.stdin.read()"
    )
    command = [sys.executable, "-c", starter, app]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert int(process.stdout.readline()) != process.pid  # the app watches
        process.communicate(
            timeout=60
        )  # ends the one who started it, and waits until nobody holds its output
