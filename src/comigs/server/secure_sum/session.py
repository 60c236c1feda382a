"""This module says what all parties know of one sum, and what they tell each other of it."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from comigs.server.secure_sum.primitives import SumError, public_key
from comigs.server.sums import FEWEST, MOST, threshold_of
from comigs.server.wire import WireError


@dataclass(frozen=True)
class Session:
    """A session is one try at one round's sum.

    id: drawn by the server, 32 hex digits. run: the run's id. round: from 1. members: the public
    keys of the clients that are asked, which are their names here. threshold: this many of them
    must have sent their numbers and help to open the sum.
    """

    id: str
    run: str
    round: int
    members: tuple[str, ...]
    threshold: int

    def __post_init__(self) -> None:
        """Raise SumError for what no client should take part in."""
        count = len(self.members)
        if not FEWEST <= count <= MOST or len(set(self.members)) != count:
            raise SumError(f"a sum of {len(set(self.members))} clients; allowed: 3 to {MOST}")
        # From half of the clients one could open another sum than the other half.
        if not max(FEWEST, count // 2 + 1) <= self.threshold <= count:
            raise SumError(f"a sum of {count} clients that {self.threshold} can open")

    @classmethod
    def new(cls, run: str, round: int, members: Sequence[str], share: float) -> Session:
        """Return a session under a name that was never used. Raises SumError for too few members.

        share: of the members that must help, in (0.5, 1].
        """
        if len(members) < FEWEST:
            raise SumError(f"{len(members)} clients, and a sum needs {FEWEST}")
        threshold = threshold_of(len(members), share)
        return cls(secrets.token_hex(16), run, round, tuple(members), threshold)

    def index(self, member: str) -> int:
        """Return the place of a member. Raises SumError where it is none."""
        if member not in self.members:
            raise SumError("a client that is no member of the sum")
        return self.members.index(member)

    def binding(self, sender: str, reader: str) -> bytes:
        """Return 32 bytes that stand for this session and who tells whom."""
        words = [self.id, self.run, str(self.round), str(self.threshold), *self.members]
        return hashlib.sha256(" ".join([*words, sender, reader]).encode()).digest()


@dataclass(frozen=True)
class Sealed:
    """A client says this when it takes part.

    key: the public half of the key that it agrees on masks with. boxes: for each other member, what
    only that member can read.
    """

    key: str
    boxes: Mapping[str, bytes]


@dataclass(frozen=True)
class Opened:
    """A client helps to open a sum with this.

    own_seed: of its own mask. shares: of each other client that sealed, its share of the own seed,
    where that client's numbers came, else of the seed of its key.
    """

    own_seed: bytes
    shares: Mapping[str, bytes]


def note_key(known: dict[str, str], name: str, key: str) -> None:
    """Note the key that a client says it has. Raises WireError for one with which no client would
    take part: one that is none, or another client's.

    known: the keys of clients, by client.
    """
    try:
        public_key(key)
    except SumError as error:
        raise WireError(str(error)) from None
    if any(other == key for client, other in known.items() if client != name):
        raise WireError("a public key that is another client's")
    known[name] = key
