"""Mean, spread and the paired t-test over seeds. Seeds are few, so degrees of freedom are small
whole numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev


@dataclass(frozen=True)
class Spread:
    """Mean over `n` seeds and their standard deviation (divided by n - 1; None with one seed)."""

    mean: float
    sd: float | None
    n: int


@dataclass(frozen=True)
class Paired:
    """A setting minus the baseline, over the seeds both have: below 0 is better than the baseline.

    difference: of the clients' mean, seed by seed. p: two-sided paired t-test over these seeds;
    None below 2 seeds or where all differences are equal. better: in how many of the (seed, client)
    `pairs` the setting is better.
    """

    difference: Spread
    p: float | None
    better: int
    pairs: int


def spread(values: Sequence[float]) -> Spread | None:
    """None where there is no value."""
    if not values:
        return None
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


def paired(
    setting: dict[int, dict[str, float]], baseline: dict[int, dict[str, float]]
) -> Paired | None:
    """Compare seed -> client -> value (the same clients everywhere). None where no seed is common.

    The seed is the unit: clients of one run share a server and are no independent repeats, so they
    are only counted.
    """
    seeds = [seed for seed in setting if seed in baseline]
    each = [
        [setting[seed][name] - baseline[seed][name] for name in setting[seed]] for seed in seeds
    ]
    difference = spread([fmean(of_seed) for of_seed in each])
    if difference is None:
        return None
    pairs = [d for of_seed in each for d in of_seed]
    return Paired(difference, _p_value(difference), sum(d < 0 for d in pairs), len(pairs))


def _p_value(difference: Spread) -> float | None:
    """Of the hypothesis that the mean difference is 0."""
    mean, sd, n = difference.mean, difference.sd, difference.n
    if sd is None or sd <= 1e-12 * abs(
        mean
    ):  # differences that are equal to the bit have no distribution
        return None
    return two_sided(mean / (sd / math.sqrt(n)), n - 1)


def two_sided(t: float, freedom: int) -> float:
    """P(|T| >= |t|) of Student's t with `freedom` >= 1 degrees of freedom (a whole number).

    The finite sums of Abramowitz & Stegun 26.7.3 and 26.7.4; absolute error about 1e-15.
    """
    angle = math.atan(abs(t) / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    first = 3 if freedom % 2 else 2
    term = total = (cosine if freedom % 2 else 1.0) if freedom > 1 else 0.0
    for k in range(first, freedom - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    within = 2 / math.pi * (angle + sine * total) if freedom % 2 else sine * total
    return min(1.0, max(0.0, 1 - within))
