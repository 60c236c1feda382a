"""This module sums the uploads of clients that are all in one process, as devices and a server do.

The protocol is that of a federation, and so is its result, to the bit, for the same uploads. It
hides nothing here, where every upload is on one disk: it is for trying what a federation will do.
Devices draw their batches from random numbers of their own, clients here from the config's seed.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from comigs.config import Config
from comigs.methods.method import Download, Upload
from comigs.server.protocol import Answers
from comigs.server.secure_sum import party
from comigs.server.secure_sum.opening import unmasked
from comigs.server.secure_sum.primitives import SumError, new_seed, private_key, public_name
from comigs.server.secure_sum.session import Session
from comigs.server.secure_sum.uploads import mean_of, origins_of, to_sum
from comigs.server.sums import with_mean, without_sum
from comigs.slots import Shapes


def summed(
    config: Config, answers: Answers, downloads: Mapping[str, Download], expected: Shapes
) -> Answers:
    """Return answers with the mean of all uploads in the place of each.

    downloads: by client, as the server has them. expected: the slots of an upload of this round.
    """
    uploads: dict[str, Upload] = {}
    for name, reply in answers.replies.items():
        if reply.upload is not None:
            uploads[name] = reply.upload
    if not uploads or not expected:
        return answers

    sent = {name: downloads.get(name, {}) for name in uploads}
    origins = origins_of(config, sent, expected)
    try:
        return with_mean(answers, uploads, _mean(config, uploads, origins))
    except SumError as error:
        return without_sum(answers, uploads, str(error))


def _mean(config: Config, uploads: Mapping[str, Upload], origins: Mapping[str, Download]) -> Upload:
    """Return the mean of uploads by the protocol, with one of them in memory at a time."""
    identities = {name: private_key(new_seed()) for name in uploads}
    members = {name: public_name(key) for name, key in identities.items()}
    session = Session.new("in-process", 1, list(members.values()), config.privacy.threshold)

    # Seal: each client's boxes go to all others.
    remembered, sealed = {}, {}
    for name, member in members.items():
        remembered[name], sealed[member] = party.seal(identities[name], session)
    keys = {member: said.key for member, said in sealed.items()}

    # Mask: what would leave a device is all that is added up.
    total: np.ndarray | None = None
    for name, member in members.items():
        numbers = to_sum(uploads[name], origins[name], config.upload, len(members))
        boxes = {other: said.boxes[member] for other, said in sealed.items() if other != member}
        remembered[name] = party.prepare(identities[name], remembered[name], keys, boxes)
        masked = party.mask(remembered[name], member, numbers)
        total = masked if total is None else total + masked
    assert total is not None

    # Open: everybody is still there.
    helped = {m: party.help_open(remembered[name], m, keys) for name, m in members.items()}
    plain = unmasked(session, keys, list(keys), total, helped)
    return mean_of(plain, origins.values(), config.upload, len(members))
