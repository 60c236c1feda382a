"""The protocol of secure aggregation by itself: sums against numpy's, whoever drops out and when,
and what a server can make of all it holds.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from comigs.config import UploadSection
from comigs.server.secure_sum import fixed_point, party, primitives, uploads
from comigs.server.secure_sum.opening import unmasked
from comigs.server.secure_sum.primitives import SumError, private_key, public_name
from comigs.server.secure_sum.session import Session, note_key, threshold_of
from comigs.server.sums import MOST
from comigs.server.validation import common_start, origin_of
from comigs.server.wire import WireError
from comigs.slots import Slot

COUNT = 50  # numbers of an upload


class Sum:
    """Parties and a server in one place, and all that the server gets to see of a session."""

    def __init__(self, members, share=2 / 3, seed=0):
        self.identities = [private_key(primitives.new_seed()) for _ in range(members)]
        self.names = [public_name(key) for key in self.identities]
        self.session = Session.new("run-01234567", 1, self.names, share)
        random = np.random.default_rng(seed)
        self.numbers = random.integers(0, 2**32, (members, COUNT), dtype=np.uint32)
        self.remembered, self.sealed, self.masked, self.answers = {}, {}, {}, {}

    def seal(self, parties):
        for n in parties:
            self.remembered[n], self.sealed[n] = party.seal(self.identities[n], self.session)

    def mask(self, parties):
        for n in parties:
            self.remembered[n] = self.prepare(n)
            self.masked[n] = party.mask(self.remembered[n], self.names[n], self.numbers[n])

    def prepare(self, n, keys=None, boxes=None):
        keys, boxes = keys or self.keys, boxes or self.boxes(n)
        return party.prepare(self.identities[n], self.remembered[n], keys, boxes)

    def open(self, parties, came=None):
        came = [self.names[n] for n in (self.masked if came is None else came)]
        for n in parties:
            self.answers[n] = party.help_open(self.remembered[n], self.names[n], came)

    def total(self, came=None):
        came = self.masked if came is None else came
        sent = sum((self.masked[n] for n in came), np.zeros(COUNT, np.uint32))
        answers = {self.names[n]: answer for n, answer in self.answers.items()}
        return unmasked(self.session, self.keys, [self.names[n] for n in came], sent, answers)

    @property
    def keys(self):
        return {self.names[n]: sealed.key for n, sealed in self.sealed.items()}

    def boxes(self, n):
        """What the server passes on to one client."""
        others = {self.names[m]: sealed for m, sealed in self.sealed.items() if m != n}
        return {name: sealed.boxes[self.names[n]] for name, sealed in others.items()}


def done(members, share=2 / 3):
    """A whole session."""
    made = Sum(members, share)
    made.seal(range(members))
    made.mask(range(members))
    made.open(range(members))
    return made


def plain(made, came):
    return made.numbers[list(came)].sum(axis=0, dtype=np.uint32)


@pytest.fixture(scope="module")
def four():
    """Sessions of four, by who sealed; who is gone later makes no difference to what was sealed."""
    made = {}
    for count in (3, 4):
        for sealed in itertools.combinations(range(4), count):
            made[sealed] = Sum(4)
            made[sealed].seal(sealed)
            made[sealed].mask(sealed)
    return made


FATES = ("stays", "never asked", "gone after sealing", "gone after masking")


@pytest.mark.parametrize("first", FATES)
def test_four_parties_whoever_drops_out_and_when(four, first):
    """All 256 patterns: the sum of those whose numbers came, or nothing, by the threshold alone."""
    opened = 0
    for rest in itertools.product(FATES, repeat=3):
        at = {fate: [n for n in range(4) if (first, *rest)[n] == fate] for fate in FATES}
        sealed = tuple(n for n in range(4) if n not in at["never asked"])
        if len(sealed) < 3:
            continue
        made, came = four[sealed], sorted(at["stays"] + at["gone after masking"])
        made.answers = {}
        if len(came) < 3:
            for n in at["stays"]:
                with pytest.raises(SumError, match="and 3 are needed"):
                    made.open([n], came)
            continue
        made.open(at["stays"], came)
        if len(at["stays"]) < 3:
            with pytest.raises(SumError, match="of the 3 clients that it takes helped"):
                made.total(came)
        else:
            np.testing.assert_array_equal(made.total(came), plain(made, came))
            opened += 1
    assert opened == (10 if first == "stays" else 1)


def test_with_too_few_that_sealed_nobody_masks_anything():
    made = Sum(4)
    made.seal([0, 2])
    with pytest.raises(SumError, match="2 clients sealed, and 3 must help"):
        made.mask([0])


@pytest.fixture(scope="module")
def sixteen():
    made = Sum(16)
    made.seal(range(16))
    made.mask(range(16))
    return made


def test_sixteen_parties_with_any_number_gone_after_each_step(sixteen):
    made, random = sixteen, np.random.default_rng(1)
    assert made.session.threshold == 11
    for after_sealing, after_masking in itertools.product(range(0, 7, 2), range(0, 7, 3)):
        gone = random.permutation(16)[: after_sealing + after_masking]
        came = sorted(set(range(16)) - set(map(int, gone[:after_sealing])))
        helping, made.answers = sorted(set(came) - set(map(int, gone[after_sealing:]))), {}
        if len(came) < 11:
            with pytest.raises(SumError, match=f"a sum of {len(came)} clients, and 11 are needed"):
                made.open(helping, came)
            continue
        made.open(helping, came)
        if len(helping) < 11:
            with pytest.raises(SumError, match=f"{len(helping)} of the 11 clients"):
                made.total(came)
        else:
            np.testing.assert_array_equal(made.total(came), plain(made, came))


# --- what a server can make of it
# ------------------------------------------------------------------------------------------------


def attempt(made, victim, helpers):
    """The victim's numbers as a server makes them of all that it has of a session that was opened,
    and of all that its helpers have: their keys, seeds and shares.
    """
    numbers = made.masked[victim] - primitives.mask_of_own(made.answers[victim].own_seed, COUNT)
    for other in set(made.sealed) - {victim}:
        of_pair = pair_mask(made, victim, other, helpers)
        numbers += of_pair if other < victim else -of_pair
    return numbers


def pair_mask(made, victim, other, helpers):
    """A helper knows its own; else it takes the key of either, from shares of it. Zeros where that
    fails.
    """
    keys = made.keys
    if other in helpers:
        own = private_key(made.remembered[other].key_seed)
        return primitives.mask_of_pair(own, keys[made.names[victim]], COUNT)
    for owner, peer in ((other, victim), (victim, other)):
        name = made.names[owner]
        shares = [made.remembered[h].shares[name][1] for h in sorted(helpers)]
        try:
            own = private_key(primitives.combine(shares[: made.session.threshold]))
        except (SumError, IndexError):
            continue
        if public_name(own) == keys[name]:
            return primitives.mask_of_pair(own, keys[made.names[peer]], COUNT)
    return np.zeros(COUNT, np.uint32)


@pytest.mark.parametrize(
    ("members", "share", "helpers", "succeeds"),
    [
        (4, 2 / 3, 0, False),
        (4, 2 / 3, 2, False),  # all but two
        (4, 2 / 3, 3, True),  # all but one: what they sent is taken from the sum
        (16, 15 / 16, 14, False),  # all but two, where all but one must help
        (16, 15 / 16, 15, True),
        (16, 2 / 3, 10, False),  # one fewer than the threshold
        (16, 2 / 3, 11, True),
    ],
)
def test_a_server_gets_at_one_upload_only_with_as_many_helpers_as_the_threshold(
    members, share, helpers, succeeds
):
    made = done(members, share=share)
    np.testing.assert_array_equal(made.total(), plain(made, range(members)))
    found = attempt(made, 0, set(range(1, 1 + helpers)))
    equal = found == made.numbers[0]
    assert equal.all() if succeeds else not equal.any()


def test_masked_numbers_are_noise():
    """Zeros look like any other numbers: bits are ones in half of all places, whatever is sent."""
    made = done(3)
    ones = np.unpackbits(np.concatenate(list(made.masked.values())).view(np.uint8)).mean()
    assert abs(ones - 0.5) < 0.05
    other = Sum(3)
    other.numbers[:] = 0
    other.seal(range(3))
    other.mask(range(3))
    ones = np.unpackbits(np.concatenate(list(other.masked.values())).view(np.uint8)).mean()
    assert abs(ones - 0.5) < 0.05
    other.open(range(3))
    assert not other.total().any()


def test_what_was_said_in_another_session_is_refused():
    """Neither a share, nor a masking for other clients, nor an opening of others."""
    made, other = Sum(3), Sum(3)
    for each in (made, other):
        each.identities, each.names = made.identities, made.names
        each.session = Session.new("run-01234567", 1, made.names, 1.0)
        each.seal(range(3))
    boxes, keys = made.boxes(0), made.keys
    with pytest.raises(SumError, match="a share of another session"):
        made.prepare(0, boxes=other.boxes(0))
    with pytest.raises(SumError, match="did not seal"):
        made.prepare(0, other.keys)
    swapped = {made.names[1]: boxes[made.names[2]], made.names[2]: boxes[made.names[1]]}
    with pytest.raises(SumError, match="that nobody made for this client"):
        made.prepare(0, boxes=swapped)
    made.mask(range(3))
    changed = {**keys, made.names[1]: other.keys[made.names[1]]}
    with pytest.raises(SumError, match="masked already, for others"):
        made.prepare(0, changed)
    again = made.prepare(0)
    same = party.mask(again, made.names[0], made.numbers[0])
    np.testing.assert_array_equal(same, made.masked[0])
    with pytest.raises(SumError, match="others than those that masked"):
        party.help_open(again, made.names[0], made.names[1:])
    with pytest.raises(SumError, match="others than those that masked"):
        party.help_open(again, made.names[0], [*made.names, "0" * 66])


NONE = "02" + "f" * 64  # no point of the curve: its x is above the field's prime


def test_a_key_that_is_none_or_two_have_is_refused_before_anything_is_masked():
    made = Sum(3)
    made.seal(range(3))
    for key, why in ((NONE, "a public key that is none"), (made.keys[made.names[2]], "3 clients")):
        with pytest.raises(SumError, match=why):
            made.prepare(0, {**made.keys, made.names[1]: key})


def test_the_server_takes_a_key_that_is_none_or_anothers_for_the_lie_it_is():
    ann, bob = (public_name(private_key(primitives.new_seed())) for _ in range(2))
    known = {}
    for name, key in (("ann", ann), ("bob", bob), ("ann", ann)):
        note_key(known, name, key)
    for key, why in ((NONE, "that is none"), (ann, "that is another client's")):
        with pytest.raises(WireError, match=why):
            note_key(known, "bob", key)
    assert known == {"ann": ann, "bob": bob}


def test_a_sealed_box_is_as_long_as_the_server_takes_it_to_be():
    made = done(3)
    assert {len(box) for n in range(3) for box in made.boxes(n).values()} == {primitives.BOX}


def test_a_session_is_of_three_or_more_and_more_than_half_open_it():
    names = [f"{n:066x}" for n in range(MOST + 1)]
    for few in range(3):
        with pytest.raises(SumError, match=f"{few} clients, and a sum needs 3"):
            Session.new("run-01234567", 1, names[:few], 2 / 3)
    with pytest.raises(SumError, match="allowed: 3 to 256"):
        Session.new("run-01234567", 1, names, 2 / 3)
    for wrong in (0, 2, 8, 17):
        with pytest.raises(SumError, match="can open"):
            Session("0" * 32, "run-01234567", 1, tuple(names[:16]), wrong)
    assert [threshold_of(n, 2 / 3) for n in (3, 4, 5, 6, 16, 64)] == [3, 3, 4, 4, 11, 43]
    assert threshold_of(16, 0.501) == 9 and threshold_of(16, 1) == 16


def test_a_dropout_that_shares_do_not_give_back_is_no_sum(four):
    """The server sees that a key is another one than was used."""
    made = four[0, 1, 2, 3]
    made.open([0, 1, 2], [0, 1, 2])
    wrong = four[0, 1, 2].remembered[0].shares[four[0, 1, 2].names[1]][1]
    answer = made.answers[0]
    shares = {**answer.shares, made.names[3]: wrong}
    made.answers[0] = replace(answer, shares=shares)
    with pytest.raises(SumError, match="shares that do not fit together"):
        made.total([0, 1, 2])


# --- whole numbers
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("members", [3, 4, 7, 8, 64, 255])
def test_a_sum_of_the_largest_numbers_does_not_overflow(members):
    for sign in (1.0, -1.0):
        values = np.full((members, 1), sign * 0.7)
        whole = [fixed_point.to_steps(value, 0.7, members) for value in values]
        total = np.sum(whole, axis=0, dtype=np.uint32)
        exact = fixed_point.from_steps(total, 0.7, members)
        assert exact == pytest.approx(sign * 0.7 * members, rel=1e-12)


def test_the_mean_is_numpys_to_half_a_step():
    random, members, bound = np.random.default_rng(0), 16, 1.0
    values = random.normal(0, 0.2, (members, 1000)).clip(-bound, bound)
    whole = [fixed_point.to_steps(value, bound, members) for value in values]
    total = np.sum(whole, axis=0, dtype=np.uint32)
    mean = fixed_point.from_steps(total, bound, members) / members
    assert np.abs(mean - values.mean(axis=0)).max() <= fixed_point.step_of(bound, members) / 2
    assert fixed_point.step_of(1.0, 16) == 2.0**-26


A, B = Slot(0, "up", "g0", "A"), Slot(0, "up", "g0", "B")
SHAPES = {B: (3, 2), A: (2, 5)}


def uploaded(random, size=0.01):
    return {slot: torch.from_numpy(random.normal(0, size, dims)) for slot, dims in SHAPES.items()}


@pytest.mark.parametrize("downloads", ["none", "one", "several"])
def test_the_mean_of_uploads_from_their_steps_whatever_they_start_from(downloads):
    """Clients that have missed a round start from other downloads, and those of the first round
    from the common start.
    """
    random, start, limits = np.random.default_rng(3), common_start(5), UploadSection()
    given = [uploaded(random, 0.1) for _ in range(3)]
    of_one = {"none": [{}] * 4, "one": given[:1] * 4, "several": [*given, {A: given[0][A]}]}
    origins = [origin_of(download, SHAPES, start) for download in of_one[downloads]]
    sent = []
    for origin in origins:
        moved = uploaded(random)
        sent.append({slot: (origin[slot] + step).float() for slot, step in moved.items()})
    whole = [uploads.to_sum(u, o, limits, 4) for u, o in zip(sent, origins, strict=True)]
    mean = uploads.mean_of(np.sum(whole, axis=0, dtype=np.uint32), origins, limits, 4)
    assert list(mean) == list(SHAPES)
    for slot in SHAPES:
        wanted = np.mean([upload[slot].double().numpy() for upload in sent], axis=0)
        assert mean[slot].dtype == torch.float32
        step = fixed_point.step_of(1.0, 4)
        np.testing.assert_allclose(mean[slot].numpy(), wanted, rtol=1.2e-7, atol=step)


def test_a_client_cuts_its_own_step_to_max_norm_and_sends_nothing_that_is_not_finite():
    random, limits = np.random.default_rng(4), UploadSection(max_norm=0.5)
    origin, upload = origin_of({}, SHAPES, common_start(1)), uploaded(random, 10.0)
    whole = uploads.to_sum(upload, origin, limits, 3)
    mean = uploads.mean_of(whole, [origin], limits, 3)
    moved = np.concatenate([(mean[slot] - origin[slot]).numpy().ravel() for slot in SHAPES])
    asked = np.concatenate([(upload[slot] - origin[slot]).numpy().ravel() for slot in SHAPES])
    assert 0.499 < np.linalg.norm(moved) < 0.5
    np.testing.assert_allclose(moved / np.linalg.norm(moved), asked / np.linalg.norm(asked), 1e-4)
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(SumError, match="not finite"):
            uploads.to_sum({**upload, A: upload[A] * wrong}, origin, limits, 3)
