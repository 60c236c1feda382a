"""Mean, spread and the paired t-test over seeds. Seeds are few, so degrees of freedom are small
whole numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import pandas as pd


@dataclass(frozen=True)
class Spread:
    """A mean over `n` seeds and their standard deviation (divided by n - 1; None with one seed)."""

    mean: float
    sd: float | None
    n: int


@dataclass(frozen=True)
class Paired:
    """A setting minus the baseline, over the seeds that both have: below 0 is better than the
    baseline.

    difference: of the clients' mean, seed by seed. p: two-sided paired t-test over these seeds;
    None below 2 seeds or where all differences are equal. better: in how many of the (seed, client)
    `pairs` the setting is better.
    """

    difference: Spread
    p: float | None
    better: int
    pairs: int


def spread(values: Sequence[float]) -> Spread | None:
    """Return the mean and deviation of values, and None where there is no value."""
    if not values:
        return None
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


def mean_over_clients(table: pd.DataFrame) -> pd.Series:
    """Return the mean of each row, which is of clients; exact, so that equal runs are equal."""
    return pd.Series(list(map(fmean, table.to_numpy().tolist())), table.index, dtype=float)


def paired(setting: pd.DataFrame, baseline: pd.DataFrame) -> Paired | None:
    """Compare two tables of seeds and the same clients. None where no seed is common.

    The seed is the unit: clients of one run share a server and are no independent repeats, so they
    are only counted.
    """
    seeds = setting.index.intersection(baseline.index)
    each = setting.loc[seeds] - baseline.loc[seeds]
    difference = spread(mean_over_clients(each).tolist())
    if difference is None:
        return None
    better = int((each < 0).to_numpy().sum())
    return Paired(difference, _p_value(difference), better, each.size)


def _p_value(difference: Spread) -> float | None:
    """Return the p of differences, and None where they have no distribution: one alone, or all
    equal to the bit.
    """
    mean, sd, n = difference.mean, difference.sd, difference.n
    if sd is None or sd <= 1e-12 * abs(mean):
        return None
    return two_sided(mean / (sd / math.sqrt(n)), n - 1)


def two_sided(t: float, freedom: int) -> float:
    """Return P(|T| >= |t|) of Student's t with `freedom` >= 1 degrees of freedom (a whole number).

    The finite sums of Abramowitz & Stegun 26.7.3 and 26.7.4; absolute error about 1e-15.
    """
    angle = math.atan(abs(t) / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    # The sums of odd degrees begin with the cosine, those of even ones with 1; one degree has none.
    odd = freedom % 2
    term = total = 0.0
    if freedom > 1:
        term = total = cosine**odd
    for k in range(2 + odd, freedom - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    within = sine * total
    if odd:
        within = 2 / math.pi * (angle + sine * total)
    return min(1.0, max(0.0, 1 - within))
