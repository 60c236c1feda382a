"""Low-rank updates against numpy in float64, where every product is written out whole."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from comigs.config import ExpertsSection
from comigs.methods import lowrank

IN, OUT = 11, 9


class Largest(TorchDispatchMode):
    """The most elements that any tensor had that was made inside."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple | list) else [result]
        self.elements = max(
            self.elements, *(t.numel() for t in made if isinstance(t, torch.Tensor)), 0
        )
        return result


def pair(rank, seed=0, sizes=(IN, OUT)):
    random = np.random.default_rng([rank, seed])
    return torch.from_numpy(random.normal(size=(rank, sizes[0]))), torch.from_numpy(
        random.normal(size=(sizes[1], rank))
    )


def product(pair):
    A, B = (t.numpy().astype(np.float64) for t in pair)
    return B @ A


def close(a, b, tolerance=1e-12):
    return np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


def test_scaling_is_alpha_over_the_rank_or_over_its_root():
    assert (
        ExpertsSection(alpha=16).scale(4)
        == ExpertsSection(alpha=16, scaling="rslora").scale(4)
        == 8
    )
    assert ExpertsSection(alpha=16, scaling="lora").scale(4) == 4
    assert ExpertsSection(alpha=3).scale(7) == pytest.approx(3 / 7**0.5, rel=1e-15)


def test_a_stack_stands_for_the_weighted_sum_of_products_of_any_ranks():
    factors, weights = [pair(rank, seed) for seed, rank in enumerate((1, 4, 2))], [0.3, -1.2, 2.0]
    A, B = lowrank.stack(factors, weights)
    assert A.shape == (7, IN) and B.shape == (OUT, 7)
    assert close(
        product((A, B)), sum(w * product(f) for f, w in zip(factors, weights, strict=True))
    )


@pytest.mark.parametrize("rank", [1, 2, 4, 5, 9])
@pytest.mark.parametrize("given", [1, 4, 12])
def test_factorizing_gives_numpys_truncated_svd(given, rank):
    """Given ranks below, at and above the smaller side of the product."""
    whole = product(pair(given))
    U, S, Vh = np.linalg.svd(whole)
    A, B = lowrank.factorize(pair(given), rank)
    assert A.shape == (rank, IN) and B.shape == (OUT, rank)
    assert close(product((A, B)), (U[:, :rank] * S[:rank]) @ Vh[:rank], 1e-12)
    np.testing.assert_allclose(
        np.linalg.norm(B.numpy(), axis=0)[:given], S[:rank][:given], rtol=1e-10
    )


@pytest.mark.parametrize("rank", [2, 4, 7, 9])
def test_every_row_of_a_factorized_pair_can_learn_even_beyond_the_products_rank(rank):
    """A row of A and a column of B that are both zero would get no gradient ever again."""
    A, B = lowrank.factorize(pair(4), rank)
    np.testing.assert_allclose((A @ A.T).numpy(), np.eye(rank), atol=1e-12)
    assert np.abs(B.numpy()[:, 4:]).max(initial=0) < 1e-12


def test_factorizing_to_more_than_the_smaller_side_pads_with_zeros():
    factors = pair(12)
    A, B = lowrank.factorize(factors, 14)
    assert A.shape == (14, IN) and B.shape == (OUT, 14)
    assert close(product((A, B)), product(factors))


def test_factorizing_nothing_at_all_stays_nothing():
    A, _ = pair(3)
    A, B = lowrank.factorize((A, torch.zeros(OUT, 3, dtype=torch.float64)), 2)
    assert not B.any() and bool(A.isfinite().all())


def test_equal_products_give_equal_factors():
    A, B = pair(3)
    mix = torch.from_numpy(np.random.default_rng(5).normal(size=(3, 3)))
    one, other = (
        lowrank.factorize((A, B), 2),
        lowrank.factorize((torch.linalg.solve(mix, A), B @ mix), 2),
    )
    split = lowrank.factorize(lowrank.stack([(A, B), (A, B)], [0.25, 0.75]), 2)
    for mine, theirs, third in zip(one, other, split, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
        torch.testing.assert_close(mine, third, rtol=0, atol=1e-10)


def test_no_other_pair_of_that_rank_comes_closer():
    """Eckart and Young: what is missed is exactly the singular values cut off."""
    factors = pair(6)
    singular = np.linalg.svd(product(factors), compute_uv=False)
    for rank in (1, 3, 5):
        missed = np.linalg.norm(product(factors) - product(lowrank.factorize(factors, rank)))
        assert missed == pytest.approx(math.sqrt((singular[rank:] ** 2).sum()), rel=1e-9)


def test_padding_keeps_the_product_and_first_rows_undo_it():
    factors = pair(3)
    padded = lowrank.pad(factors, 5)
    assert padded[0].shape == (5, IN) and padded[1].shape == (OUT, 5)
    assert close(product(padded), product(factors))
    assert all(
        torch.equal(a, b) for a, b in zip(lowrank.first_rows(padded, 3), factors, strict=True)
    )
    assert all(t.dtype == torch.float64 for t in padded)


@pytest.mark.parametrize("rank", [1, 3, 12])
def test_the_norm_of_a_product_is_numpys(rank):
    assert lowrank.product_norm(pair(rank)) == pytest.approx(
        np.linalg.norm(product(pair(rank))), rel=1e-12
    )
    assert lowrank.product_norm((pair(rank)[0], torch.zeros(OUT, rank, dtype=torch.float64))) == 0


def test_the_whole_product_is_never_formed():
    size, rank = 200, 3
    factors = [pair(rank, seed, (size, size)) for seed in range(4)]
    with Largest() as largest:
        stacked = lowrank.stack(factors, [0.25] * 4)
        lowrank.factorize(stacked, rank)
        lowrank.product_norm(stacked)
    assert size * rank * 4 <= largest.elements < size * size / 10
    with Largest() as largest:  # the same look does see it
        factors[0][1] @ factors[0][0]
    assert largest.elements == size * size
