"""One device in a sum: what it says twice, what it refuses, and what a restart makes it forget."""

from __future__ import annotations

import pytest
import torch

from comigs.federation.device.device_run import DeviceRun
from comigs.federation.device.device_sum import DeviceSum
from comigs.federation.device.limits import Limits
from comigs.federation.messages import REQUESTS, Answered, Refusal
from comigs.federation.sum_messages import OpenedRound, SealedRound, SumRequest, read_rows, rows
from comigs.server import wire
from comigs.server.secure_sum import party
from comigs.server.secure_sum.primitives import new_seed, private_key, public_name
from comigs.server.secure_sum.session import Session
from tests.device import ROOM, RUN, Setting, opened

ON = {"secure_aggregation": True}
QUICK = {"evaluation": {"every": 0, "keep": "last"}, "client": {"steps": 1, "router_steps": 0}}


class InSum(Setting):
    """A device and three others, which are played here, in a session of each id."""

    def __init__(self, root, **tree):
        super().__init__(root, privacy=ON, method="fedavg", rounds=2, **QUICK, **tree)
        self.others = [private_key(new_seed()) for _ in range(3)]
        self.me = self.say("announce")[0].key
        self.members = tuple(sorted([self.me, *map(public_name, self.others)]))

    def say(self, kind, of_sum=None, tensors=None, round=1, trainer=None):
        raw = self.request(round, kind=kind, sum=of_sum, evaluate=(), evaluate_base=())
        head, download = wire.unpack(raw, REQUESTS, ROOM)
        raw = wire.pack(head, {**download, **(tensors or {})})
        return opened((trainer or self.trainer).answer(raw))

    def about(self, session="0" * 32, members=None, threshold=3, **more):
        members = self.members if members is None else members
        return SumRequest(session=session, members=members, threshold=threshold, **more)

    def sealed(self, session="0" * 32, round=1):
        """Seal for all; return what an exchange says, with its tensors."""
        head, _ = self.say("seal", self.about(session), round=round)
        assert isinstance(head, SealedRound)
        about = Session(session, RUN, round, self.members, 3)
        said = {public_name(key): party.seal(key, about)[1] for key in self.others}
        keys = {name: of.key for name, of in said.items()} | {self.me: head.key}
        boxes = {name: of.boxes[self.me] for name, of in said.items()}
        in_order = tuple(keys[member] for member in self.members)
        return self.about(session, keys=in_order), rows(boxes, self.members)

    def refusal(self, *given, **how):
        head, tensors = self.say(*given, **how)
        assert isinstance(head, Refusal) and not tensors
        return head.code, self.said[-1]


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    return InSum(tmp_path_factory.mktemp("device"))


def test_what_is_no_sum_or_none_that_hides_anything_is_refused(device):
    few, twice = device.members[:2], (device.me, device.me, *device.members[:2])
    for members, threshold, why in (
        (few, 3, "a sum of 2 clients; allowed: 3 to 256"),
        (twice, 3, "allowed: 3 to 256"),
        (device.members, 2, "a sum of 4 clients that 2 can open"),
        (tuple(public_name(key) for key in device.others), 3, "no member of the sum"),
    ):
        code, said = device.refusal("seal", device.about("f" * 32, members, threshold))
        assert code == "refused" and why in said, said
    for kind in ("seal", "open", "exchange"):
        code, said = device.refusal(kind)
        assert code == "refused" and "an upload that is not masked" in said
    for kind in ("open", "exchange"):
        code, said = device.refusal(kind, device.about("e" * 32, keys=device.members))
        assert code == "lost" and "that this device did not seal" in said


def test_a_masked_upload_is_said_again_and_no_message_can_be_replayed(device):
    about, boxes = device.sealed()
    head, tensors = device.say("exchange", about, boxes)
    assert isinstance(head, Answered) and tensors["sum"].dtype == torch.int32
    restarted = device.restarted()
    assert torch.equal(device.say("exchange", about, boxes, trainer=restarted)[1]["sum"],
                       tensors["sum"])  # fmt: skip
    assert "masked already" in device.refusal("seal", about)[1]

    # What came is opened once, of one set of clients.
    came, others = device.members, [m for m in device.members if m != device.me]
    for wrong, why in (
        ((device.me, others[0]), "a sum of 2 clients, and 3 are needed"),
        (tuple(others), "others than those that masked"),
        ((*came, "02" + "0" * 64), "others than those that masked"),
    ):
        assert why in device.refusal("open", device.about(came=wrong))[1]
    head, tensors = device.say("open", device.about(came=came))
    assert isinstance(head, OpenedRound)
    again, same = device.say("open", device.about(came=came), trainer=device.restarted())
    assert again == head and torch.equal(tensors["rows"], same["rows"])
    code, said = device.refusal("open", device.about(came=(device.me, *others[:2])))
    assert code == "refused" and "opened already, for others" in said
    shares = read_rows(tensors, device.members)
    assert sum(any(share) for share in shares.values()) == 3


def test_a_round_that_came_to_nothing_is_masked_anew_and_opened_for_the_same_clients_only(device):
    """In another session of round 1, after the first was opened."""
    before = device.trainer.device.home / "runs" / RUN / "metrics.jsonl"
    lines = before.read_bytes()
    about, boxes = device.sealed("1" * 32)
    head, tensors = device.say("exchange", about, boxes)
    assert head.session == "1" * 32 and before.read_bytes() == lines  # nothing is trained twice
    head, same = device.say("exchange", about, boxes, trainer=device.restarted())
    assert torch.equal(tensors["sum"], same["sum"])
    fewer = (device.me, *[m for m in device.members if m != device.me][:2])
    assert "for others" in device.refusal("open", device.about("1" * 32, came=fewer))[1]
    assert isinstance(
        device.say("open", device.about("1" * 32, came=device.members))[0], OpenedRound
    )


def test_nothing_is_trained_for_a_sum_that_cannot_be(tmp_path, monkeypatch):
    """One client's bad key or box, passed on by the server, cost all others a round's training."""

    def trained(*given, **how):
        raise AssertionError("trained")

    monkeypatch.setattr("comigs.federation.device.device_service.run_task", trained)
    device = InSum(tmp_path)
    about, boxes = device.sealed()
    place = [member == device.me for member in device.members].index(False)

    def with_key(key):
        return about.model_copy(
            update={"keys": (*about.keys[:place], key, *about.keys[place + 1 :])}
        )

    for asked, sent, why in (
        (None, boxes, "an upload that is not masked"),
        (with_key("02" + "f" * 64), boxes, "a public key that is none"),
        (with_key(about.keys[place - 1]), boxes, "4 clients sealed"),
        (about.model_copy(update={"keys": about.keys[1:]}), boxes, "keys that do not fit"),
        (about, {"rows": boxes["rows"].flip(0)}, "nobody made for this client"),
        (about, {}, "a table that does not fit"),
    ):
        code, said = device.refusal("exchange", asked, sent)
        assert code == "refused" and why in said, said
    assert device.refusal("exchange", about, boxes)[0] == "failed"


def test_of_the_next_round_on_nothing_of_the_last_is_answered(device):
    about, boxes = device.sealed("2" * 32, round=2)
    broken = {"rows": boxes["rows"].flip(0)}
    code, said = device.refusal("exchange", about, broken, round=2)
    assert code == "refused" and "nobody made for this client" in said
    head, _ = device.say("exchange", about, boxes, round=2)
    assert isinstance(head, Answered)
    code, said = device.refusal("open", device.about("1" * 32, came=device.members))
    assert code == "lost"
    code, said = device.refusal("seal", device.about("3" * 32))
    assert code == "over" and "asked to seal round 1 again" in said


def test_batches_are_the_runs_own_and_the_same_after_a_restart(tmp_path, monkeypatch):
    """Killed before its answer is kept, a device trains as it would have; another device, or run,
    with the same config does not.
    """
    learnt, mask = [], DeviceSum.mask

    def watched(self, prepared, upload, download):
        learnt.append({slot: tensor.clone() for slot, tensor in upload.items()})
        return mask(self, prepared, upload, download)

    def alike(one, other):
        return all(torch.equal(one[slot], other[slot]) for slot in one)

    monkeypatch.setattr(DeviceSum, "mask", watched)
    device = InSum(tmp_path)
    about, boxes = device.sealed()
    with monkeypatch.context() as patch:
        patch.setattr(DeviceRun, "keep", lambda *given: 1 / 0)
        device.refusal("exchange", about, boxes)
    head, _ = device.say("exchange", about, boxes, trainer=device.restarted())
    assert isinstance(head, Answered) and len(learnt) == 2 and alike(*learnt)
    another = InSum(tmp_path, home="another")
    another.say("exchange", *another.sealed())
    assert not alike(learnt[0], learnt[2])


def test_where_nothing_is_summed_nothing_is_sealed_and_an_owner_may_want_sums_only(tmp_path):
    limits = Limits(only_sums=True)
    plain, strict = Setting(tmp_path), Setting(tmp_path, home="strict", device={"limits": limits})
    assert plain.refused(kind="announce") == "refused"
    assert "asked for a sum that no config mentions" in plain.said[-1]
    assert strict.refused() == "refused"
    assert "privacy.secure_aggregation: given False" in strict.said[-1]
    assert "(--only-sums)" in strict.said[-1]
