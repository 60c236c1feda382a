"""The accountant says what noised steps come to: epsilon, and the noise for a given epsilon.

The figures are dp-accounting's (Google): privacy loss distributions (2207.04380), neighbours that
differ by one document more or less, and Poisson sampling. A step in which each document is with
probability q, and whose sum has Gaussian noise of sigma times the clip, is one event there.

A server chooses the numbers that a device counts with, and tables of losses grow with epsilon and
with the number of steps. So Renyi's bound (1702.07476) comes first: it is true as well, larger, and
takes the same milliseconds for any numbers. Tables are made where it says that they stay small.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from comigs.config import LEAST_NOISE
from comigs.errors import UserError, require_extra

Kind = tuple[float, float, int]  # as Steps

# Losses are rounded up to multiples of this part of Renyi's bound, within these limits. So epsilon
# comes out larger, by less than 1 % from 0.01 on and for up to 100,000 steps.
PART, FINEST, COARSEST = 1e-3, 1e-5, 1e-3
# Beyond this epsilon, or so many steps, Renyi's bound is what is told.
MOST_EPSILON, MOST_STEPS = 200.0, 100_000
# Where noise is small, orders near 1 are those that count.
ORDERS = (
    *(1.05, 1.1, 1.15, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0),
    *(16.0, 20.0, 24.0, 32.0, 48.0, 64.0, 128.0, 256.0, 512.0),
)
TOLERANCE = 5e-4  # of a noise multiplier that is found, as a part of it
MOST_NOISE = 1e6  # that is looked for


@dataclass(frozen=True)
class Steps:
    """Steps are alike: each document is in one with probability `sampling_rate`.

    noise_multiplier: the noise's standard deviation over the clip. count: how many steps.
    """

    sampling_rate: float
    noise_multiplier: float
    count: int


def require_accountant() -> None:
    """Raise UserError where dp-accounting is not installed."""
    require_extra("privacy", ("dp_accounting",), "privacy.level")


def epsilon(steps: Iterable[Steps], delta: float) -> float:
    """Return the epsilon of all these steps together; infinite where one has less than the least
    noise.
    """
    counts = Counter[tuple[float, float]]()
    for alike in steps:
        counts[alike.sampling_rate, alike.noise_multiplier] += alike.count
    return _epsilon(tuple(sorted((*kind, n) for kind, n in counts.items() if n)), delta)


@cache
def _epsilon(steps: tuple[Kind, ...], delta: float) -> float:
    if not steps:
        return 0.0
    if any(noise_multiplier < LEAST_NOISE for _, noise_multiplier, _ in steps):
        return math.inf
    bound, count = _renyi(steps, delta), sum(number for _, _, number in steps)
    if bound > MOST_EPSILON or count > MOST_STEPS:
        return bound

    # Both are true; the tables' is larger for a very small delta, of which they know nothing.
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld.pld_privacy_accountant import PLDAccountant

    interval = min(COARSEST, max(FINEST, PART * bound))
    relation = NeighboringRelation.ADD_OR_REMOVE_ONE
    tables = PLDAccountant(relation, value_discretization_interval=interval)
    return min(bound, _composed(tables, steps, delta))


def _renyi(steps: tuple[Kind, ...], delta: float) -> float:
    """Return Renyi's bound on epsilon."""
    from dp_accounting import NeighboringRelation
    from dp_accounting.rdp import RdpAccountant

    return _composed(RdpAccountant(ORDERS, NeighboringRelation.ADD_OR_REMOVE_ONE), steps, delta)


def _composed(accountant: Any, steps: tuple[Kind, ...], delta: float) -> float:
    import dp_accounting

    for sampling_rate, noise_multiplier, count in steps:
        noised = dp_accounting.GaussianDpEvent(noise_multiplier)
        step = dp_accounting.PoissonSampledDpEvent(sampling_rate, noised)
        accountant.compose(step, count)
    return float(accountant.get_epsilon(delta))


@cache
def noise_multiplier_for(epsilon: float, delta: float, sampling_rate: float, count: int) -> float:
    """Return the least noise multiplier, to a thousandth of it, with which `count` steps spend
    `epsilon`.

    They spend no more than that. It is LEAST_NOISE where less would do. Raises UserError where no
    noise does.
    """
    from scipy.optimize import brentq  # dp-accounting's own

    def excess(noise: float) -> float:
        spent = _epsilon(((sampling_rate, noise, count),), delta)
        return math.log(max(spent, sys.float_info.min) / epsilon)

    if excess(LEAST_NOISE) <= 0:
        return LEAST_NOISE

    # Renyi's bound takes no time, and is not far above: it says where to begin.
    high = 2 * LEAST_NOISE
    while _renyi(((sampling_rate, high, count),), delta) > epsilon:
        high *= 2
        if high > MOST_NOISE:
            raise UserError(
                f"privacy.epsilon: given {epsilon:g} at delta {delta:g} for {count:,} steps, which "
                f"takes noise of more than {MOST_NOISE:,.0f} times the clip; must be larger"
            )
    low = high / 2
    while excess(low) <= 0:
        low, high = max(LEAST_NOISE, low / 2), low

    # The logarithm is nearly straight, so that few trials do; the root may be a little too small.
    found = float(brentq(excess, low, high, rtol=TOLERANCE))
    while excess(found) > 0:
        found *= 1 + TOLERANCE
    return found
