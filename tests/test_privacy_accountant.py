"""What noised steps come to, held against closed forms, integrals and published figures."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from comigs.errors import UserError
from comigs.files import ClosedFolder
from comigs.privacy.accountant import (
    LEAST_NOISE,
    MOST_EPSILON,
    MOST_STEPS,
    Steps,
    epsilon,
    noise_multiplier_for,
)
from comigs.privacy.budget import OWNERS_DELTA, Budget, BudgetSpent, Ledger, Plan
from comigs.privacy.noise import gaussian, poisson_sample, step_generator

MNIST = 256 / 60_000


def delta_of_gaussian(eps, sigma):
    """The exact delta of one Gaussian of sensitivity 1 (Balle and Wang 2018, theorem 8)."""

    def phi(x):
        return math.erfc(-x / math.sqrt(2)) / 2

    first = phi(1 / (2 * sigma) - eps * sigma)
    return first - math.exp(eps) * phi(-1 / (2 * sigma) - eps * sigma)


def delta_of_sampled(eps, rate, sigma):
    """The delta of one step with Poisson sampling, by summing densities, the worse way round."""
    x = np.linspace(-40, 40, 400_001)

    def density(mean):
        return np.exp(-(((x - mean) / sigma) ** 2) / 2) / (sigma * math.sqrt(2 * math.pi))

    without, with_one = density(0), (1 - rate) * density(0) + rate * density(1)
    width = x[1] - x[0]
    removed = np.maximum(with_one - math.exp(eps) * without, 0).sum() * width
    added = np.maximum(without - math.exp(eps) * with_one, 0).sum() * width
    return max(removed, added)


@pytest.mark.parametrize(("sigma", "count"), [(5.0, 30), (2.0, 1), (20.0, 200)])
def test_without_sampling_it_is_the_closed_form(sigma, count):
    found = epsilon([Steps(1.0, sigma, count)], 1e-5)
    exact = delta_of_gaussian(found, sigma / math.sqrt(count))
    assert 0.95e-5 < exact <= 1e-5  # epsilon is rounded up


@pytest.mark.parametrize(("rate", "sigma"), [(0.1, 1.0), (0.5, 0.8), (0.01, 2.0)])
def test_one_sampled_step_is_the_integral(rate, sigma):
    found = epsilon([Steps(rate, sigma, 1)], 1e-4)
    assert delta_of_sampled(found, rate, sigma) <= 1.0001e-4
    assert delta_of_sampled(found * 0.99 - 1e-3, rate, sigma) > 1e-4


@pytest.mark.parametrize(
    ("rate", "sigma", "count", "lower", "upper"),
    [  # Bu et al. 1911.11607, table 2: by the central limit, and by the moments accountant
        (MNIST, 1.3, round(15 / MNIST), 0.83, 1.19),
        (MNIST, 1.1, round(60 / MNIST), 2.32, 3.01),
        # Abadi et al. 1607.00133, section 3.2, with the moments accountant
        (0.01, 4.0, 10_000, 0.0, 1.26),
    ],
)
def test_published_figures_are_on_either_side(rate, sigma, count, lower, upper):
    assert lower * 0.98 < epsilon([Steps(rate, sigma, count)], 1e-5) < upper


@pytest.mark.parametrize(("rate", "sigma", "count"), [(0.02, 1.0, 100), (0.2, 2.0, 50)])
def test_it_is_never_above_renyi(rate, sigma, count):
    from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    orders = [1.5, 2, 3, 4, 6, 8, 12, 16, 32, 64]
    renyi = RdpAccountant(orders, NeighboringRelation.ADD_OR_REMOVE_ONE)
    renyi.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(sigma)), count)
    assert epsilon([Steps(rate, sigma, count)], 1e-5) < renyi.get_epsilon(1e-5)


@pytest.mark.parametrize(
    ("wanted", "delta", "rate", "count"),
    [
        (3.0, 1e-5, 0.3, 20),
        (8.0, 1e-14, 0.1, 100),  # the least delta that a config may have
        (8.0, 1e-20, 0.1, 100),  # beyond what tables of losses can tell
        (0.01, 1e-5, 0.1, 100),
        (100.0, 1e-5, 0.5, 100),
        (8.0, 1e-5, 0.1, 10 * MOST_STEPS),
        (1e6, 1e-5, 0.5, 10**12),
    ],
)
def test_noise_for_an_epsilon_spends_no_more_and_hardly_less(wanted, delta, rate, count):
    noise = noise_multiplier_for(wanted, delta, rate, count)
    assert 0.99 * wanted < epsilon([Steps(rate, noise, count)], delta) <= wanted


@pytest.mark.parametrize(("rate", "sigma", "count"), [(1e-3, 0.25, 200), (1e-4, 0.2, 300)])
def test_little_noise_and_few_documents_are_counted_by_tables(rate, sigma, count):
    """Renyi's bound over whole orders is twenty to a hundred times as large there."""
    from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
    from dp_accounting.pld.pld_privacy_accountant import PLDAccountant

    tables = PLDAccountant(
        NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=1e-3
    )
    tables.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(sigma)), count)
    assert epsilon([Steps(rate, sigma, count)], 1e-5) == pytest.approx(
        tables.get_epsilon(1e-5), rel=0.01
    )


@pytest.mark.parametrize("sigma", [100.0, 20.0])
def test_a_small_epsilon_is_as_exact_as_a_large_one(sigma):
    """Without sampling the truth is a closed form: epsilon 0.03 and 0.2."""
    found = epsilon([Steps(1.0, sigma, 1)], 1e-5)
    assert delta_of_gaussian(0.99 * found, sigma) > 1e-5 >= delta_of_gaussian(found, sigma)


def test_numbers_of_a_server_take_no_tables(monkeypatch):
    """A table for these would have thousands of millions of rows."""
    from dp_accounting.pld.pld_privacy_accountant import PLDAccountant

    monkeypatch.setattr(PLDAccountant, "__init__", None)
    assert noise_multiplier_for(1e9, 1e-6, 0.3, 100_000) == LEAST_NOISE
    assert noise_multiplier_for(1e30, 1e-6, 0.3, 10**12) == LEAST_NOISE
    assert MOST_EPSILON < epsilon([Steps(0.3, 0.5, 10_000)], 1e-6) < 1e6
    assert epsilon([Steps(0.01, 30.0, MOST_STEPS), Steps(0.01, 30.0, 1)], 1e-6) < 3
    noise = noise_multiplier_for(3.0, 1e-6, 0.01, 10**12)
    assert 2.9 < epsilon([Steps(0.01, noise, 10**12)], 1e-6) <= 3
    with pytest.raises(UserError, match=r"privacy.epsilon: given 1e-09 .* must be larger"):
        noise_multiplier_for(1e-9, 1e-6, 0.3, 10**12)


def test_steps_alike_are_one_and_no_noise_is_no_privacy():
    halves = [Steps(0.3, 2.0, 5), Steps(0.3, 2.0, 5)]
    assert epsilon(halves, 1e-5) == epsilon([Steps(0.3, 2.0, 10)], 1e-5)
    assert epsilon([Steps(0.3, 2.0, 5), Steps(0.1, 0.0, 1)], 1e-5) == math.inf
    assert epsilon([], 1e-5) == 0


def test_noise_is_gaussian_and_never_the_same_twice():
    drawn = [gaussian(step_generator(None, "ada", 0), (40_000,), 3.0) for _ in range(2)]
    for noise in drawn:
        assert abs(noise.mean()) < 0.08 and abs(noise.std() - 3) < 0.06
        assert abs(np.mean(np.abs(noise) < 3) - 0.6827) < 0.012
    assert not np.intersect1d(*drawn).size
    again = [gaussian(step_generator(7, "ada", 0), (9,), 3.0) for _ in range(2)]
    assert (again[0] == again[1]).all()


def test_each_document_joins_a_step_by_itself():
    random = np.random.default_rng(1)
    steps = [set(poisson_sample(random, 50, 0.2)) for _ in range(4000)]
    sizes = [len(step) for step in steps]
    assert abs(np.mean(sizes) - 10) < 0.15 and abs(np.var(sizes) - 8) < 0.6  # binomial
    together = np.mean([{3, 4} <= step for step in steps])
    assert abs(together - 0.04) < 0.012
    assert any(not set(poisson_sample(random, 3, 0.2)) for _ in range(50))  # nobody may come


PLAN = Plan(population=10, sampling_rate=0.3, noise_multiplier=2.0, steps=2, delta=1e-3)


def test_what_is_spent_is_on_the_disk_first_and_counts_again_after_a_crash(tmp_path):
    ledger = Ledger(ClosedFolder(tmp_path), "clients/ada/privacy.json")
    budget = Budget(PLAN, ledger, "run", most=PLAN.epsilon(2))
    assert budget.spend(1) == PLAN.epsilon(1)
    assert [entry.round for entry in ledger.entries()] == [1]
    assert budget.spend(1) == PLAN.epsilon(2)  # round 1 again
    with pytest.raises(BudgetSpent, match=r"round 2: privacy budget spent: .* \(privacy.epsilon\)"):
        budget.spend(2)
    assert len(ledger.entries()) == 2


def test_the_owners_budget_is_over_all_runs(tmp_path):
    ledger = Ledger(ClosedFolder(tmp_path), "privacy.json")
    most = epsilon([Steps(0.3, 2.0, 4)], OWNERS_DELTA)
    for run in ("a", "b"):
        Budget(PLAN, ledger, run, owner=most).spend(1)
    with pytest.raises(BudgetSpent, match=r"in all runs, at delta 1e-05 \(--max-epsilon\)"):
        Budget(PLAN, ledger, "c", owner=most).spend(1)
    assert Budget(PLAN, ledger, "c", most=PLAN.epsilon(1)).spend(1) == PLAN.epsilon(1)
    for limit in ("most", "owner"):
        with pytest.raises(BudgetSpent):
            Budget(PLAN, ledger, "d", **{limit: math.nan}).spend(1)


def test_a_ledger_that_was_lost_or_damaged_is_refused(tmp_path):
    ledger = Ledger(ClosedFolder(tmp_path), "privacy.json")
    with pytest.raises(UserError, match="counts 0 rounds of a run that has done 1"):
        Budget(PLAN, ledger, "run").require_counted(1)
    (tmp_path / "privacy.json").write_text("[{]")
    with pytest.raises(UserError, match="damaged"):
        Budget(PLAN, ledger, "run").spend(1)


def test_hardly_any_noise_counts_as_none_and_takes_no_memory():
    assert epsilon([Steps(0.3, 0.09, 5)], 1e-5) == math.inf
    assert noise_multiplier_for(1e6, 1e-5, 0.3, 5) == LEAST_NOISE


def test_the_owners_epsilon_is_not_stretched_by_a_delta_that_the_server_chooses(tmp_path):
    """Each run has as large a delta as it may; together they are counted at the owner's."""
    wide = replace(PLAN, delta=0.05)
    one = epsilon([Steps(0.3, 2.0, 2)], OWNERS_DELTA)
    two = epsilon([Steps(0.3, 2.0, 4)], OWNERS_DELTA)
    assert wide.epsilon(2) < one < two
    ledger = Ledger(ClosedFolder(tmp_path), "privacy.json")
    Budget(wide, ledger, "a", owner=(one + two) / 2).spend(1)
    with pytest.raises(BudgetSpent, match=r"in all runs, at delta 1e-05 \(--max-epsilon\)"):
        Budget(wide, ledger, "b", owner=(one + two) / 2).spend(1)
