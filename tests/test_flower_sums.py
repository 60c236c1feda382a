"""Sums over Flower: what devices send is masked, whoever drops out and when, and the server never
has an upload.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
from types import FunctionType, ModuleType

import numpy as np
import pytest
import torch

from comigs.app import api
from comigs.errors import UserError
from comigs.federation.device.device_service import Trainer
from comigs.federation.device.device_sum import DeviceSum
from comigs.federation.flower import round_sum
from comigs.federation.messages import ANSWERS, REQUESTS
from comigs.runs.folder import RunFolder
from comigs.server import collect, wire
from comigs.server.secure_sum import uploads
from comigs.server.secure_sum.primitives import SumError
from tests.conftest import run_config
from tests.local_grid import FIRST_NODE, ONE, Federation, TestTrainer, events

NAMES = ("ada", "bob", "cyd", "dan")
ROOM = 1 << 26
BOB, CYD, DAN = FIRST_NODE + 1, FIRST_NODE + 2, FIRST_NODE + 3


OWN_SEED = DeviceSum.batch_seed


class Told(TestTrainer):
    """Does something of a test's before it answers: `on[kind, round]`, once."""

    def __init__(self, *given):
        super().__init__(*given)
        self.on, self.asked, self.given = {}, [], {}

    def before(self, raw):
        request, tensors = wire.unpack(raw, REQUESTS, ROOM)
        self.asked.append((request.kind, request.round))
        if request.kind == "exchange":
            self.given[request.round] = tensors
        return self.on.pop((request.kind, request.round), lambda raw: None)(raw)


def of_the_config(patch):
    """Let devices draw their batches from the config's seed, as clients in one process do."""
    patch.setattr(DeviceSum, "batch_seed", None)


@pytest.fixture(autouse=True, scope="module")
def draws_as_in_one_process():
    """What a run is apart from its draws can so be held against one process, to the bit."""
    with pytest.MonkeyPatch.context() as patch:
        of_the_config(patch)
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    root = tmp_path_factory.mktemp("text")
    run_config(root, " ".join(NAMES))
    return root


@pytest.fixture
def federation(tmp_path, text):
    return Federation(tmp_path / "federation", NAMES, text, Told)


def configured(text, names=NAMES, **tree):
    quick = {"evaluation": {"every": 0, "keep": "last"}, "client": {"steps": 1, "router_steps": 0}}
    settings = {"rounds": 2, "method": "fedavg", "privacy": {"secure_aggregation": True}, **quick}
    return run_config(text, " ".join(names), **{**settings, **tree})


@pytest.fixture(scope="module")
def in_process(text, tmp_path_factory):
    return api.run(configured(text), tmp_path_factory.mktemp("in-process") / "run")


def in_memory(*objects):
    """All bytes, arrays and tensors that these hold or lead to, code and its modules left out."""
    seen, found, ahead = set(), [], list(objects)
    while ahead:
        one = ahead.pop()
        if id(one) in seen or isinstance(one, type | ModuleType):
            continue
        seen.add(id(one))
        if isinstance(one, bytes | bytearray):
            found.append(bytes(one))
        elif isinstance(one, np.ndarray | torch.Tensor):
            found.append(np.asarray(one).tobytes())
        elif isinstance(one, FunctionType):
            ahead += one.__closure__ or ()
        else:
            ahead += gc.get_referents(one)
    return b"|".join(found)


@pytest.fixture(scope="module")
def memories():
    """What the server holds whenever it opens a sum; filled by `whole`."""
    return []


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory, memories):
    """A run that nobody disturbs: its devices, its folder, all messages, and what was masked."""
    root, plain, to_sum = tmp_path_factory.mktemp("whole"), [], uploads.to_sum
    federation = Federation(root / "federation", NAMES, text, Told)

    def watched(upload, *given):
        numbers = to_sum(upload, *given)
        plain.append(({slot: t.clone() for slot, t in upload.items()}, numbers.copy()))
        return numbers

    unmasked = round_sum.unmasked

    def opening(*given):
        # All that the round has at hand, and what it leads to: engine, dispatcher, messages.
        masked, total = given[3].tobytes(), unmasked(*given)
        memories.append((in_memory(sys._getframe(1).f_locals), masked, total.tobytes()))
        return total

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("comigs.federation.device.device_sum.to_sum", watched)
        patch.setattr(round_sum, "unmasked", opening)
        return federation, root / "run", federation.run(root / "run", configured(text)), plain


def lines(out, kind):
    return [line for line in RunFolder.open(out).metrics() if line.kind == kind]


def absent(out):
    return [(line.round, line.client, line.reason) for line in lines(out, "absent")]


def trained(out):
    return [(line.round, line.client) for line in lines(out, "train")]


def is_as_in_one_process(out, in_process):
    return (out / "metrics.jsonl").read_bytes() == (in_process.path / "metrics.jsonl").read_bytes()


ALL = [(round, name) for round in (1, 2) for name in NAMES]


def test_a_run_is_what_it_is_in_one_process_to_the_bit(whole, in_process):
    federation, out, _, _ = whole
    assert is_as_in_one_process(out, in_process) and trained(out) == ALL
    for name in NAMES:
        own = RunFolder.open(federation.device_run(name))
        one, other = (f.load(f"clients/{name}/personal") for f in (own, in_process))
        assert all(torch.equal(one[slot], other[slot]) for slot in one)
        assert not own.files.has(".sum.json")  # nothing is left of the last round's secrets
    asked = federation.trainers["dan"].asked
    assert [kind for kind, _ in asked] == [
        *("announce", "seal", "exchange", "open", "seal", "exchange", "open", "exchange")
    ]


def test_owners_are_shown_each_others_keys(whole):
    own, others = {}, {}
    for name, said in whole[0].said.items():
        (line,) = [line for line in said if "this device's key is" in line]
        own[name], told = line.split("key is ")[1].split(", theirs are ")
        others[name] = told.split(":")[0].split(", ")
    for name in NAMES:
        assert sorted(others[name]) == sorted(own[other] for other in NAMES if other != name)


def test_no_upload_is_in_any_byte_of_any_message_or_of_the_server(whole):
    """Neither as numbers nor as fixed-point steps; what the server has of them is their mean."""
    federation, out, grid, plain = whole
    files = [path.read_bytes() for path in out.rglob("*") if path.is_file()]
    everything, found, differing = b"".join([*grid.seen, *files]), 0, 0
    assert len(plain) == 8
    for first in (0, 4):
        of_round = plain[first : first + 4]
        for slot in of_round[0][0]:
            tensors = [upload[slot] for upload, _ in of_round]
            mean = torch.stack(tensors).double().mean(0).float()
            given = federation.trainers["ada"].given[2 + first // 4][str(slot)]
            torch.testing.assert_close(given, mean, rtol=2**-23, atol=2**-28)
            assert given.numpy().tobytes() in everything
            for tensor in tensors:
                same = torch.equal(tensor, given)
                assert same or tensor.numpy().tobytes() not in everything
                differing += not same
        for _, numbers in of_round:
            pieces = [numbers[at : at + 8] for at in range(0, len(numbers), 8)]
            found += sum(bool(p.any()) and p.tobytes() in everything for p in pieces)
    assert found == 0 and differing > 50


def test_no_upload_is_in_the_servers_memory_when_it_opens_a_sum(whole, memories):
    """Nor in any message that it still has: the masked sum is there, and nobody's numbers."""
    _, _, grid, plain = whole
    assert len(memories) == 2
    for first, (memory, masked, total) in zip((0, 4), memories, strict=True):
        uploads, numbers = zip(*plain[first : first + 4], strict=True)
        assert sum(numbers[1:], numbers[0]).tobytes() == total
        # What is there is found: the masked sum, and messages with what devices sent.
        assert masked in memory and sum(raw in memory for raw in grid.seen) > 8
        for one in numbers:
            pieces = [one[at : at + 8] for at in range(0, len(one), 8)]
            assert not [at for at, p in enumerate(pieces) if p.any() and p.tobytes() in memory]
        differing = 0
        for slot in uploads[0]:
            own = {upload[slot].numpy().tobytes() for upload in uploads}
            if len(own) == len(uploads):
                assert not [tensor for tensor in own if tensor in memory], slot
                differing += 1
        assert differing > 10


def going(federation, out, config):
    """A run that is about to begin, and its grid."""
    federation.create(out, config)
    return federation.grid()


@pytest.mark.parametrize("kind", ["seal", "exchange", "open"])
@pytest.mark.few(2)
def test_one_that_drops_out_costs_nobody_else_the_round(federation, text, tmp_path, kind):
    """Before it has sealed, before its upload came, and after: then it is in the sum."""
    out, config = tmp_path / "run", configured(text)
    grid = going(federation, out, config)
    federation.trainers["dan"].on[kind, 2] = lambda raw: grid.offline.add(DAN)
    federation.go_on(out, grid)
    missing = [(2, "dan")] if kind != "open" else []
    assert trained(out) == [of for of in ALL if of not in missing]
    assert [(round, name) for round, name, _ in absent(out)] == [*missing, (3, "dan")]
    assert RunFolder.open(out).checkpoint().finished


def no_key(head, tensors):
    return head.model_copy(update={"key": "02" + "f" * 64}), tensors


def narrow(head, tensors):
    return head, {name: table[:, :100].clone() for name, table in tensors.items()}


@pytest.mark.parametrize(
    ("kind", "lie", "why"),
    [
        ("announce", no_key, "a public key that is none"),
        ("seal", no_key, "a public key that is none"),
        ("seal", narrow, "a table that does not fit the members of the sum"),
    ],
)
def test_who_says_what_no_sum_can_be_made_of_is_named_and_costs_nobody_else_the_round(
    federation, text, tmp_path, kind, lie, why
):
    """Such a key made every honest device refuse to mask, and such a table ended the run."""
    out, config = tmp_path / "run", configured(text, rounds=1)
    grid, dan = going(federation, out, config), federation.trainers["dan"]

    def lying(raw):
        with ONE:
            honest = Trainer.answer(dan, raw)
        return wire.pack(*lie(*wire.unpack(honest, ANSWERS, ROOM)))

    dan.on[kind, 1] = lying
    federation.go_on(out, grid)
    assert absent(out)[0] == (1, "dan", why)
    assert trained(out) == [(1, name) for name in ("ada", "bob", "cyd")]


def test_rounds_go_on_without_one_that_stays_away(federation, text, tmp_path):
    """Nobody waits for the key of a device that is gone, as long as others are there."""
    out, config = tmp_path / "run", configured(text, rounds=3)
    grid = going(federation, out, config)
    federation.trainers["dan"].on["seal", 2] = lambda raw: grid.offline.add(DAN)
    federation.go_on(out, grid)
    assert [(round, name) for round, name, _ in absent(out)] == [(2, "dan"), (3, "dan"), (4, "dan")]
    assert RunFolder.open(out).checkpoint().finished


@pytest.mark.timeout(60)  # it waited without end
def test_a_sum_of_three_does_not_wait_for_one_that_was_revoked(federation, text, tmp_path):
    out, file = tmp_path / "run", federation.root / "clients.json"
    grid, commit = going(federation, out, configured(text, NAMES[:3])), RunFolder.commit

    def die(self, number, *given, **how):
        if self.path == out and number == 2:
            raise KeyboardInterrupt
        return commit(self, number, *given, **how)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunFolder, "commit", die)
        federation.go_on(out, grid)
    known = json.loads(file.read_text(encoding="utf-8"))
    del known["cyd"]
    file.write_text(json.dumps(known), encoding="utf-8")
    with pytest.raises(UserError, match="too few are left to ask"):
        federation.go_on(out, federation.grid())


def test_below_the_threshold_nothing_is_opened_and_the_round_is_tried_again(
    federation, text, in_process, tmp_path
):
    """Two are gone after all have trained: nobody trains twice, the same uploads are masked anew,
    and the run is what it would have been.
    """
    out, grid = tmp_path / "run", going(federation, tmp_path / "run", configured(text))
    trainers, asked = federation.trainers, federation.trainers["ada"].asked

    gone = threading.Event()

    def leave(raw):
        grid.offline.update({CYD, DAN})
        trainers["ada"].on["announce", 2] = lambda raw: grid.offline.clear()
        gone.set()

    trainers["cyd"].on["open", 2] = leave
    trainers["dan"].on["open", 2] = lambda raw: gone.wait(60) and None
    federation.go_on(out, grid, patience=3.0)
    assert trained(out) == ALL and is_as_in_one_process(out, in_process)
    assert asked.count(("open", 2)) == 2 and asked.count(("exchange", 2)) == 2
    done = [line for line in federation.said["ada"] if "trained and answered" in line]
    assert len(done) == 2  # once a round
    (note,) = [e for e in events(out) if "0 of the 1 uploads it needs" in e.get("message", "")]
    assert "no sum of this round: 2 of the 3 clients that it takes helped" in note["message"]


def test_where_others_are_there_than_those_who_helped_the_round_is_tried_with_these(
    federation, text, tmp_path
):
    """dan is away when the round is sealed, and cyd when it is opened. ada and bob, who have helped
    to open the sum without dan, will open no other.
    """
    out, grid = tmp_path / "run", going(federation, tmp_path / "run", configured(text))
    trainers = federation.trainers
    trainers["dan"].on["seal", 2] = lambda raw: grid.offline.add(DAN)

    def leave(raw):
        grid.offline.add(CYD)
        trainers["ada"].on["announce", 2] = lambda raw: grid.offline.clear()

    trainers["cyd"].on["open", 2] = leave
    federation.go_on(out, grid, patience=3.0)
    assert RunFolder.open(out).checkpoint().finished
    assert {name for round, name in trained(out) if round == 2} == {"ada", "bob", "cyd"}


def test_a_sum_whose_opening_was_begun_is_opened_for_no_other_clients(
    federation, text, in_process, tmp_path
):
    """All but ada are gone when the sum of four is opened, and dan when it is masked anew: to open
    it for three would bind bob and cyd to these, and then there is no sum that three would open.
    """
    out, grid = tmp_path / "run", going(federation, tmp_path / "run", configured(text))
    trainers, gone = federation.trainers, threading.Event()

    def leave(raw):
        grid.offline.update({BOB, CYD, DAN})
        trainers["ada"].on["announce", 2] = come_back
        gone.set()
        return b"-"  # it has not heard of it

    def come_back(raw):
        grid.offline.clear()
        trainers["dan"].on["exchange", 2] = leave_again

    def leave_again(raw):
        grid.offline.add(DAN)
        trainers["ada"].on["announce", 2] = lambda raw: grid.offline.clear()

    trainers["bob"].on["open", 2] = leave
    for name in ("cyd", "dan"):
        trainers[name].on["open", 2] = lambda raw: gone.wait(60) and b"-"
    federation.go_on(out, grid, patience=1.0)
    assert trained(out) == ALL and is_as_in_one_process(out, in_process)


@pytest.mark.timeout(100)
def test_one_that_is_needed_to_open_a_sum_is_waited_for(federation, text, in_process, tmp_path):
    """dan is away when the round is sealed, and cyd when it is opened, which comes back long after
    dan: ada and bob have helped to open the sum without dan, and will open no other.
    """
    out, grid = tmp_path / "run", going(federation, tmp_path / "run", configured(text))
    trainers = federation.trainers
    trainers["dan"].on["seal", 2] = lambda raw: grid.offline.add(DAN)

    def leave(raw):
        grid.offline.add(CYD)
        grid.offline.discard(DAN)
        threading.Timer(3, grid.offline.clear).start()

    trainers["cyd"].on["open", 2] = leave
    federation.go_on(out, grid)
    assert {name for round, name in trained(out) if round == 2} == {"ada", "bob", "cyd"}
    assert RunFolder.open(out).checkpoint().finished


def test_a_sum_that_could_not_be_opened_is_opened_for_the_same_clients(
    federation, text, tmp_path, monkeypatch
):
    """As where a share is wrong, though enough helped; dan, who is back, is not in it."""
    out, grid = tmp_path / "run", going(federation, tmp_path / "run", configured(text))
    unmasked, left = round_sum.unmasked, [2]

    def wrong(session, *given):
        if session.round in left:
            left.remove(session.round)
            grid.offline.clear()
            raise SumError("shares that do not fit together")
        return unmasked(session, *given)

    monkeypatch.setattr(round_sum, "unmasked", wrong)
    federation.trainers["dan"].on["seal", 2] = lambda raw: grid.offline.add(DAN)
    federation.go_on(out, grid)
    assert trained(out) == [of for of in ALL if of != (2, "dan")]
    assert absent(out) == [(2, "dan", "not in the sum whose opening was begun before")]


def test_a_sum_that_did_not_do_is_opened_again_for_the_same_clients(federation, text, tmp_path):
    """ada's lines are refused once and too few are left; dan, who is back, is not in the sum."""
    config = configured(text, participation={"min_clients": 3})
    out, grid = tmp_path / "run", going(federation, tmp_path / "run", config)
    accepted, left = collect.check_lines, [(2, "ada")]

    def refused(reply, name, *given, **how):
        if (reply.round, name) in left:
            left.remove((reply.round, name))
            grid.offline.clear()
            return "metrics of something else"
        return accepted(reply, name, *given, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect, "check_lines", refused)
        federation.trainers["dan"].on["seal", 2] = lambda raw: grid.offline.add(DAN)
        federation.go_on(out, grid)
    assert trained(out) == [of for of in ALL if of != (2, "dan")]


@pytest.mark.slow  # it waits
def test_what_comes_late_is_dropped(federation, text, tmp_path):
    """dan's masked upload of round 1 comes when the round is over; the next is with it again."""
    config = configured(text, participation={"deadline": 8, "max_failures": 9}, rounds=3)
    out, grid = tmp_path / "run", going(federation, tmp_path / "run", config)
    gate = threading.Event()
    federation.trainers["dan"].on["exchange", 1] = lambda raw: gate.wait(60) and None
    federation.trainers["ada"].on["open", 1] = lambda raw: gate.set()
    federation.go_on(out, grid)
    assert (1, "dan") not in trained(out) and (3, "dan") in trained(out)
    assert (1, "dan", "no answer by the deadline") in absent(out)
    assert all(name == "dan" for _, name, _ in absent(out))
    model = RunFolder.open(federation.device_run("ada")).load("clients/ada/personal")
    assert max(float(tensor.abs().max()) for tensor in model.values()) < 1.5  # no mask is in it


@pytest.mark.parametrize("gone", [False, True])
def test_the_server_may_die_after_it_has_opened_a_sum(gone, federation, text, in_process, tmp_path):
    """It seals the round anew, and devices open the same sum again and no other: without dan, if
    dan was not in it and is back now.
    """
    out, grid = tmp_path / "run", going(federation, tmp_path / "run", configured(text))
    commit = RunFolder.commit
    if gone:
        federation.trainers["dan"].on["seal", 2] = lambda raw: grid.offline.add(DAN)

    def die(self, number, *given, **how):
        if self.path == out and number == 2 and not how.get("finished"):
            raise KeyboardInterrupt
        return commit(self, number, *given, **how)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunFolder, "commit", die)
        federation.go_on(out, grid)
    federation.go_on(out, federation.grid())
    assert gone or is_as_in_one_process(out, in_process)
    why = "not in the sum whose opening was begun before"
    assert absent(out) == ([(2, "dan", why)] if gone else [])


@pytest.mark.parametrize("own", [True, False])
def test_a_run_that_is_repeated_without_one_client_does_not_tell_its_upload(
    own, federation, text, tmp_path, monkeypatch
):
    """It would, where devices draw their batches from the config's seed, which the server has."""
    if own:
        monkeypatch.setattr(DeviceSum, "batch_seed", OWN_SEED)
    sent, mask = {}, DeviceSum.mask

    def watched(self, prepared, upload, download):
        sent[self._run.name] = {str(slot): tensor.clone() for slot, tensor in upload.items()}
        return mask(self, prepared, upload, download)

    monkeypatch.setattr(DeviceSum, "mask", watched)
    means = []
    for names in (NAMES, NAMES[:3]):
        tree = {"rounds": 1, "client": {"steps": 4, "router_steps": 0}}
        federation.run(tmp_path / names[-1], configured(text, names=names, **tree))
        means.append(federation.trainers["ada"].given[2])
    four, three = means
    off = among = 0.0
    for slot, upload in sent["dan"].items():
        guess = 4 * four[slot].double() - 3 * three[slot].double()
        off += float((guess - upload).square().sum())
        among += float((sent["ada"][slot] - upload).square().sum())
    # No nearer to dan's than another client's is, or the whole of it.
    assert off > among if own else off < 1e-6 * among
