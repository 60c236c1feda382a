"""This module says whether a config's uploads can be summed, and what a sum makes of replies.

Where `privacy.secure_aggregation` is set, engines have the sum of uploads and no upload. Each reply
that counts then comes with the mean in the place of its upload, one object for all of them, and a
method that averages makes the same mean of that. So the round loop is one and the same.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace

from comigs.config import Config
from comigs.errors import UserError, require_extra
from comigs.methods.method import Upload
from comigs.server.protocol import Answers

FEWEST = 3  # clients of a sum: of two, each could tell the other's numbers
MOST = 256  # clients of a sum: to share a seed among n takes n^2 steps


def threshold_of(members: int, share: float) -> int:
    """Return how many of the members must help: `share` of them, more than half, at least 3."""
    return max(FEWEST, members // 2 + 1, math.ceil(share * members - 1e-9))


def require_sums(config: Config) -> None:
    """Raise UserError where uploads are to be summed, and there cannot be any sum."""
    if not config.privacy.secure_aggregation:
        return
    asked = config.asked
    if not FEWEST <= asked <= MOST:
        raise UserError(
            f"privacy.secure_aggregation: given true, but {asked} of {len(config.clients)} clients "
            f"are asked in a round; a sum hides one among {FEWEST} to {MOST}"
        )
    # A sum is opened once, of those that came, and nobody can be added to it afterwards.
    participation, enough = config.participation, threshold_of(asked, config.privacy.threshold)
    if participation.min_clients > enough:
        raise UserError(
            f"participation.min_clients: given {participation.min_clients}, but a sum of {asked} "
            f"clients is opened when {enough} are there (privacy.threshold), and no other can be "
            f"added to it then; allowed: 1 to {enough}, or a higher threshold"
        )
    # A prior is of clients with similar steps.
    if any(config.router_data_of(client) == "prior" for client in config.clients):
        raise UserError(
            'client.router_data: given "prior" beside privacy.secure_aggregation, with which '
            "nobody can tell whose uploads are similar; choose another one"
        )
    require_extra("flower", ("flwr", "cryptography"), "privacy.secure_aggregation")


def with_mean(answers: Answers, summed: Collection[str], mean: Upload) -> Answers:
    """Return answers in which the clients of a sum have its mean as their upload."""
    replies = dict(answers.replies)
    for name in summed:
        replies[name] = replace(replies[name], upload=mean)
    return replace(answers, replies=replies)


def without_sum(answers: Answers, asked: Collection[str], why: str) -> Answers:
    """Return answers of which no upload counts, since there is no sum. why: in a few words."""
    others = [name for name in asked if name not in answers.absent]
    absent = dict.fromkeys(others, f"no sum of this round: {why}") | answers.absent
    return replace(answers, replies={}, absent=absent, blameless=others)
