"""The paired t-test, against printed tables, closed forms and a numerical integral; differences,
against numpy.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from comigs.experiments.compare import t_test
from comigs.experiments.compare.t_test import Paired, spread, two_sided

# Critical values of Student's t, two-sided: NIST/SEMATECH e-Handbook 1.3.6.7.2
TABLE = {  # freedom -> t at p = 0.10, 0.05, 0.02, 0.01, 0.002
    1: (6.314, 12.706, 31.821, 63.657, 318.309),
    2: (2.920, 4.303, 6.965, 9.925, 22.327),
    3: (2.353, 3.182, 4.541, 5.841, 10.215),
    4: (2.132, 2.776, 3.747, 4.604, 7.173),
    5: (2.015, 2.571, 3.365, 4.032, 5.893),
    9: (1.833, 2.262, 2.821, 3.250, 4.297),
    30: (1.697, 2.042, 2.457, 2.750, 3.385),
    100: (1.660, 1.984, 2.364, 2.626, 3.174),
}


@pytest.mark.parametrize("freedom", TABLE)
def test_p_values_are_those_of_printed_tables(freedom: int) -> None:
    for t, p in zip(TABLE[freedom], (0.10, 0.05, 0.02, 0.01, 0.002), strict=True):
        assert two_sided(t, freedom) == pytest.approx(p, rel=2e-3)
        assert two_sided(-t, freedom) == two_sided(t, freedom)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 2.5, 40.0])
def test_p_values_of_one_and_two_degrees_have_a_closed_form(t: float) -> None:
    assert two_sided(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), abs=1e-14)
    assert two_sided(t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-14)


@pytest.mark.parametrize("freedom", [3, 4, 7, 10, 29])
def test_p_values_are_the_integral_of_the_density(freedom: int) -> None:
    log_c = (
        math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(freedom * math.pi) / 2
    )
    for t in (0.2, 1.1, 3.3):
        x = np.linspace(-t, t, 200_001)
        density = np.exp(log_c - (freedom + 1) / 2 * np.log1p(x * x / freedom))
        assert two_sided(t, freedom) == pytest.approx(1 - np.trapezoid(density, x), abs=1e-8)


def test_many_degrees_come_near_the_normal_distribution() -> None:
    assert two_sided(1.96, 5000) == pytest.approx(math.erfc(1.96 / math.sqrt(2)), abs=1e-4)


def test_spread_divides_by_n_minus_1_and_has_none_of_one() -> None:
    values = [5.0, 5.25, 4.0]
    measured = spread(values)
    assert measured is not None
    assert (measured.mean, measured.sd, measured.n) == pytest.approx(
        (np.mean(values), np.std(values, ddof=1), 3)
    )
    alone = spread([2.0])
    assert alone is not None and alone.sd is None
    assert spread([]) is None


def paired(a: dict[int, dict[str, float]], b: dict[int, dict[str, float]]) -> Paired | None:
    """Compare seed -> client -> value."""
    one, other = (pd.DataFrame.from_dict(runs, orient="index") for runs in (a, b))
    return t_test.paired(one, other)


def random_runs(
    seeds: list[int], level: float, rng: np.random.Generator
) -> dict[int, dict[str, float]]:
    return {
        seed: {name: level + rng.normal(0, 0.1) for name in ("ann", "bob", "cyd")} for seed in seeds
    }


def test_the_seed_is_the_unit_of_the_paired_test() -> None:
    rng = np.random.default_rng(1)
    a, b = random_runs([1, 2, 3, 4], 5.0, rng), random_runs([4, 2, 3, 1], 5.1, rng)
    result = paired(a, b)
    assert result is not None
    each = np.array([[a[seed][name] - b[seed][name] for name in a[seed]] for seed in (1, 2, 3, 4)])
    of_seed = each.mean(axis=1)
    assert result.difference.mean == pytest.approx(of_seed.mean())
    assert result.difference.sd == pytest.approx(of_seed.std(ddof=1))
    t = of_seed.mean() / (of_seed.std(ddof=1) / 2)
    assert result.p == pytest.approx(two_sided(t, 3))
    assert (result.better, result.pairs) == ((each < 0).sum(), 12)


def test_only_common_seeds_are_paired() -> None:
    rng = np.random.default_rng(2)
    a, b = random_runs([1, 2, 3], 5.0, rng), random_runs([2, 3, 9], 5.1, rng)
    result = paired(a, b)
    assert result == paired({seed: a[seed] for seed in (2, 3)}, {seed: b[seed] for seed in (2, 3)})
    assert result is not None and result.difference.n == 2
    assert paired({1: {"ann": 1.0}}, {2: {"ann": 1.0}}) is None


def test_swapping_setting_and_baseline_turns_the_sign_only() -> None:
    rng = np.random.default_rng(3)
    a, b = random_runs([1, 2, 3], 5.0, rng), random_runs([1, 2, 3], 5.0, rng)
    one, other = paired(a, b), paired(b, a)
    assert one is not None and other is not None
    assert one.difference.mean == pytest.approx(-other.difference.mean)
    assert one.p == pytest.approx(other.p)
    assert one.better + other.better == one.pairs


@pytest.mark.parametrize("shift", [0.0, -0.25])
def test_no_test_of_one_seed_or_of_equal_differences(shift: float) -> None:
    base = {seed: {"ann": 5.0 + seed} for seed in (1, 2, 3)}
    moved = {seed: {"ann": values["ann"] + shift} for seed, values in base.items()}
    equal, single = paired(moved, base), paired({1: moved[1]}, base)
    assert equal is not None and equal.p is None and equal.difference.sd == 0
    assert single is not None and single.p is None and single.difference.sd is None
    assert equal.better == (3 if shift else 0)
