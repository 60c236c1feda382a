"""This module is the server's side of a sum: it takes the masks away, from the sum alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from comigs.server.secure_sum.primitives import (
    SumError,
    combine,
    mask_of_own,
    mask_of_pair,
    private_key,
    public_name,
)
from comigs.server.secure_sum.session import Opened, Session


def unmasked(
    session: Session,
    keys: Mapping[str, str],
    came: Collection[str],
    total: np.ndarray,
    answers: Mapping[str, Opened],
) -> np.ndarray:
    """Return the sum of the numbers of those whose numbers came, modulo 2^32: (N,) uint32.

    keys: the public keys of all that sealed. came: whose masked numbers are in `total`, their sum
    modulo 2^32. answers: of those that help. Raises SumError where they are too few, or do not fit.
    """
    if len(answers) < session.threshold:
        raise SumError(f"{len(answers)} of the {session.threshold} clients that it takes helped")
    plain = total.copy()

    # Who helps says its own seed itself; of who has gone since, the others' shares give it.
    for member in came:
        if member in answers:
            seed = answers[member].own_seed
        else:
            seed = _combined(session, member, answers)
        plain -= mask_of_own(seed, len(plain))

    # Who sealed and sent nothing has left its half of a mask in the numbers of each of the others.
    for member in keys.keys() - set(came):
        key = private_key(_combined(session, member, answers))
        if public_name(key) != keys[member]:
            raise SumError("shares that do not fit together")
        for other in came:
            of_pair = mask_of_pair(key, keys[other], len(plain))
            if session.index(other) < session.index(member):
                plain -= of_pair
            else:
                plain += of_pair
    return plain


def _combined(session: Session, member: str, answers: Mapping[str, Opened]) -> bytes:
    given = [opened.shares[member] for opened in answers.values() if member in opened.shares]
    return combine(given[: session.threshold])
