"""This module is a client's side of a sum: it seals, masks its numbers, and helps to open the sum.

Each step is a function from what the client remembers to what it says; what it has to remember is
in `Remembered`, and whoever calls keeps it, on the disk where the client may be killed in between.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from comigs.server.secure_sum.primitives import (
    SHARE,
    PrivateKey,
    SumError,
    agreed_key,
    mask_of_own,
    mask_of_pair,
    new_seed,
    open_box,
    private_key,
    public_key,
    public_name,
    seal_box,
    split,
)
from comigs.server.secure_sum.session import Opened, Sealed, Session


@dataclass(frozen=True)
class Remembered:
    """A client remembers this of a sum until it is opened.

    own_seed: of its own mask. key_seed: of the key that it agrees on masks with. keys: the public
    keys of all that sealed; empty until the numbers are masked. shares: of each other client that
    sealed, the shares of its own seed and of its key's.
    """

    session: Session
    own_seed: bytes
    key_seed: bytes
    keys: Mapping[str, str] = field(default_factory=dict)
    shares: Mapping[str, tuple[bytes, bytes]] = field(default_factory=dict)


def seal(identity: PrivateKey, session: Session) -> tuple[Remembered, Sealed]:
    """Take part in a session with seeds drawn anew. Raises SumError where this client is no member.

    identity: the key by whose public half the client is a member.
    """
    me = public_name(identity)
    session.index(me)
    own_seed, key_seed = new_seed(), new_seed()
    count, threshold = len(session.members), session.threshold
    cut = [split(seed, threshold, count) for seed in (own_seed, key_seed)]

    # A share says whom it is for and of which session, so that no server can deliver it elsewhere.
    boxes = {}
    for number, member in enumerate(session.members):
        if member != me:
            content = session.binding(me, member) + cut[0][number] + cut[1][number]
            boxes[member] = seal_box(agreed_key(identity, member), content)
    public = public_name(private_key(key_seed))
    return Remembered(session, own_seed, key_seed), Sealed(public, boxes)


def prepare(
    identity: PrivateKey,
    remembered: Remembered,
    keys: Mapping[str, str],
    boxes: Mapping[str, bytes],
) -> Remembered:
    """Return what masks this client's numbers, and opens their sum. Raises SumError where the
    session is not as it should be: nothing is trained for one that is not.

    keys: the public keys of all that sealed, of this client, too. boxes: from each of the others. A
    client masks its numbers for one set of others only, since the difference between two would be
    the mask of a pair.
    """
    me, session = public_name(identity), remembered.session
    own_key = private_key(remembered.key_seed)
    if keys.get(me) != public_name(own_key):
        raise SumError("a session that this client did not seal")
    if remembered.keys and remembered.keys != keys:
        raise SumError("a session that was masked already, for others")
    if len(keys) < session.threshold or len(set(keys.values())) != len(keys):
        raise SumError(f"{len(keys)} clients sealed, and {session.threshold} must help")

    # All keys and shares are read now: what is wrong with one is known before anything leaves.
    shares = {}
    for member, key in keys.items():
        if member != me:
            public_key(key)
            shares[member] = _shares(session, member, me, agreed_key(identity, member), boxes)
    return replace(remembered, keys=dict(keys), shares=shares)


def mask(prepared: Remembered, me: str, numbers: np.ndarray) -> np.ndarray:
    """Return the numbers under all masks. me: this client. numbers: (N,) uint32."""
    session, own_key = prepared.session, private_key(prepared.key_seed)
    masked: np.ndarray = numbers + mask_of_own(prepared.own_seed, len(numbers))
    place = session.index(me)
    for member, key in prepared.keys.items():
        if member == me:
            continue
        of_pair = mask_of_pair(own_key, key, len(numbers))
        if place < session.index(member):
            masked += of_pair
        else:
            masked -= of_pair
    return masked


def help_open(remembered: Remembered, me: str, came: Collection[str]) -> Opened:
    """Return what opens the sum of those whose numbers came. Raises SumError for too few.

    me: this client, whose numbers are among them. Of every other client one share is given, never
    both: whoever calls sees to it that a session is opened once.
    """
    session = remembered.session
    if not remembered.keys or me not in came or not set(came) <= remembered.keys.keys():
        raise SumError("a sum of others than those that masked their numbers")
    if len(set(came)) < session.threshold:
        raise SumError(f"a sum of {len(set(came))} clients, and {session.threshold} are needed")
    given = {}
    for member, (of_own, of_key) in remembered.shares.items():
        given[member] = of_own if member in came else of_key
    return Opened(remembered.own_seed, given)


def _shares(
    session: Session, sender: str, me: str, key: bytes, boxes: Mapping[str, bytes]
) -> tuple[bytes, bytes]:
    content, binding = open_box(key, boxes.get(sender, b"")), session.binding(sender, me)
    of_own, of_key = content[len(binding) : -SHARE], content[-SHARE:]
    if not content.startswith(binding) or len(of_own) != SHARE:
        raise SumError("a share of another session")
    return of_own, of_key
