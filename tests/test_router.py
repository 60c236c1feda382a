"""Routing weights and balance loss against numpy written from docs' formulas, token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from comigs.experts.router import balance_loss, route, route_gated, routing_inputs
from tests import naive
from tests.conftest import attach, random_tensors, shape_of, tiny

CASES = [(E, K) for E in (2, 3, 4) for K in range(1, E + 1)]
SHARES = [0.0, 0.25, 0.5, 0.9]


def random_logits(num_experts, num_tokens=50):
    return torch.from_numpy(
        np.random.default_rng(num_experts).normal(0, 2, (num_tokens, num_experts))
    )


def numpy_weights(logits_TE, top_k, chosen_by_TE=None):
    """Softmax over the K largest logits; K = 1: the largest of the softmax over all."""
    weights_TE = np.zeros_like(logits_TE)
    by_TE = logits_TE if chosen_by_TE is None or top_k == 1 else chosen_by_TE
    for t, row in enumerate(logits_TE):
        best = np.argsort(by_TE[t])[::-1][:top_k]
        among = row if top_k == 1 else row[best]
        weights_TE[t, best] = np.exp(row[best]) / np.exp(among).sum()
    return weights_TE


def numpy_balance(logits_TE, top_k, share, chosen_by_TE=None):
    """METHOD: density_e, p_e and factor_e, then E^2 * mean_e of their product."""
    T, E = logits_TE.shape
    weights_TE = numpy_weights(logits_TE, top_k, chosen_by_TE)
    chosen_TE = weights_TE > 0
    density_E = chosen_TE.sum(axis=0) / T / top_k
    z_TE = np.where(chosen_TE, logits_TE, 0.0)
    softmax_TE = np.exp(z_TE) / np.exp(z_TE).sum(axis=1, keepdims=True)
    p_E = (weights_TE if top_k == 1 else softmax_TE).mean(axis=0)
    factor_E = (
        np.array([1 / (share * E)] + (E - 1) * [(E - 1) / ((1 - share) * E)])
        if share
        else np.ones(E)
    )
    return E**2 * np.mean(p_E * density_E * factor_E)


@pytest.mark.parametrize(("num_experts", "top_k"), CASES)
def test_weights_equal_numpy(num_experts, top_k):
    logits_TE = random_logits(num_experts)
    routing = route(logits_TE, top_k)
    expected = numpy_weights(logits_TE.numpy(), top_k)
    # K >= 2 takes its softmax in float32
    np.testing.assert_allclose(
        routing.weights_TE.numpy(), expected, rtol=0, atol=1e-12 if top_k == 1 else 1e-6
    )
    assert np.array_equal(routing.selected_TE.numpy(), expected > 0)
    assert (routing.selected_TE.sum(dim=-1) == top_k).all()


@pytest.mark.parametrize(("num_experts", "top_k"), [c for c in CASES if c[1] > 1])
def test_weights_of_two_or_more_experts_sum_to_one(num_experts, top_k):
    sums = route(random_logits(num_experts), top_k).weights_TE.sum(dim=-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-6)


def test_a_single_experts_weight_is_its_probability_and_teaches_the_router():
    logits_TE = random_logits(3).requires_grad_()
    routing = route(logits_TE, top_k=1)
    probabilities = logits_TE.softmax(dim=-1)
    assert torch.equal(routing.weights_TE.max(dim=-1).values, probabilities.max(dim=-1).values)
    assert (routing.weights_TE.sum(dim=-1) < 1).all()
    routing.weights_TE.sum().backward()
    assert (logits_TE.grad != 0).all()


def test_equal_logits_still_select_exactly_top_k():
    for top_k in (1, 2, 3):
        assert (route(torch.zeros(5, 4), top_k).selected_TE.sum(dim=-1) == top_k).all()


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(("num_experts", "top_k"), CASES)
def test_balance_loss_equals_numpy(num_experts, top_k, share):
    logits_TE = random_logits(num_experts)
    ours = balance_loss(route(logits_TE, top_k), share)
    assert float(ours) == pytest.approx(numpy_balance(logits_TE.numpy(), top_k, share), rel=1e-7)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(("num_experts", "top_k"), CASES)
def test_gradient_of_the_balance_loss_equals_that_of_the_naive_one(num_experts, top_k, share):
    logits_TE = random_logits(num_experts, 6)
    ours, theirs = (logits_TE.clone().requires_grad_() for _ in range(2))
    balance_loss(route(ours, top_k), share).backward()
    naive.balance(theirs, top_k, share).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-7)


def test_balance_loss_is_one_and_teaches_nothing_where_two_of_two_are_used():
    for seed in range(5):
        logits_TE = torch.from_numpy(
            np.random.default_rng(seed).normal(0, 3, (40, 2))
        ).requires_grad_()
        loss = balance_loss(route(logits_TE, top_k=2), 0.5)
        loss.backward()
        assert loss.item() == pytest.approx(1, abs=1e-12)
        assert logits_TE.grad.abs().max() < 1e-15


@pytest.mark.parametrize(
    ("share", "wanted"), [(0.0, (4, 4, 4)), (0.5, (6, 3, 3)), (2 / 3, (8, 2, 2))]
)
def test_balance_loss_is_least_where_the_first_expert_has_its_share_and_the_others_an_equal_rest(
    share, wanted
):
    def loss(counts):
        chosen = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
        return float(
            balance_loss(route(40.0 * torch.nn.functional.one_hot(chosen, 3).double(), 1), share)
        )

    possible = [(a, b, 12 - a - b) for a in range(13) for b in range(13 - a)]
    assert min(possible, key=loss) == wanted


def random_sequences():
    return torch.from_numpy(np.random.default_rng(3).normal(size=(4, 9, 5)))


def test_a_token_is_routed_by_itself_by_its_sequence_so_far_or_by_nothing():
    x_BLD = random_sequences()
    flat = x_BLD.numpy().reshape(-1, 5)
    assert np.array_equal(routing_inputs(x_BLD, "token").numpy(), flat)
    prefix_means = [x_BLD[b, : t + 1].numpy().mean(axis=0) for b in range(4) for t in range(9)]
    np.testing.assert_allclose(routing_inputs(x_BLD, "sequence").numpy(), prefix_means, rtol=1e-12)
    assert np.array_equal(routing_inputs(x_BLD, "client").numpy(), np.ones((36, 1)))


@pytest.mark.parametrize("routing", ["token", "sequence", "client"])
def test_no_token_is_routed_by_a_later_one_or_by_another_sequence(routing):
    """To the bit, wherever the text goes on differently; and by sequence, an earlier token does
    count.
    """
    x_BLD = random_sequences()
    other = x_BLD.clone()
    other[1, 6:] += 100.0
    other[2] -= 50.0
    one, two = (routing_inputs(x, routing).reshape(4, 9, -1) for x in (x_BLD, other))
    for sequence, untouched in ((0, 9), (1, 6), (3, 9)):
        assert torch.equal(one[sequence, :untouched], two[sequence, :untouched])
    assert torch.equal(one[1, 6:], two[1, 6:]) == (routing == "client")
    earlier = x_BLD.clone()
    earlier[1, 2] += 1.0
    changed = (routing_inputs(earlier, routing).reshape(4, 9, -1) != one).any(dim=-1)[1].tolist()
    counts = {"token": [2], "sequence": [2, 3, 4, 5, 6, 7, 8], "client": []}[routing]
    assert [t for t, c in enumerate(changed) if c] == counts


def test_routing_in_the_model_stays_float32_under_autocast():
    base = tiny("tiny-llama")
    with attach(base.model, base.architecture) as attachment:
        attachment.bind(random_tensors(attachment, shape_of(1, 2), routed=True))
        with torch.autocast("cpu", torch.bfloat16):
            attachment.model(torch.arange(9)[None])
        for routing in attachment.routings():
            assert routing.logits_TE.dtype == routing.weights_TE.dtype == torch.float32


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(("num_experts", "top_k"), [(2, 2), (3, 2), (4, 2), (4, 4)])
def test_a_router_that_is_partly_open_mixes_the_weights_of_two(num_experts, top_k, share):
    logits = random_logits(num_experts)
    weights = route_gated(logits, top_k, torch.tensor([share])).weights_TE
    behind = np.append(np.zeros(num_experts - 1), -np.log(9))
    expected = share * numpy_weights(logits.numpy() + behind, top_k, logits.numpy())
    alone = np.ones((len(logits), 1))  # the only one has all the weight
    others = num_experts - 1
    closed = numpy_weights(logits.numpy()[:, :-1], min(top_k, others)) if others > 1 else alone
    expected[:, :-1] += (1 - share) * closed
    np.testing.assert_allclose(weights.numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(weights.sum(dim=-1).numpy(), 1, atol=1e-6)


def test_the_others_are_chosen_as_often_as_anybody_and_learn():
    """Beside two own experts, of which a token uses two, they would start log 9 too late."""
    logits_TE = torch.randn(3000, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    routing = route_gated(logits_TE, 2, torch.ones(1))
    assert routing.selected_TE.double().mean(dim=0) == pytest.approx([2 / 3] * 3, abs=0.03)
    (routing.weights_TE[:, -1].sum()).backward()
    assert logits_TE.grad[:, -1].count_nonzero() > 1900
    # as much as they would have of two that are equal
    equal = route_gated(torch.tensor([[0.0, -1.0, 0.0]]), 2, torch.ones(1)).weights_TE
    np.testing.assert_allclose(equal, [[0.9, 0.0, 0.1]], atol=1e-6)


def test_the_others_start_with_a_tenth_of_the_weight():
    weights = route_gated(torch.zeros(3, 2), 2, torch.ones(1)).weights_TE
    np.testing.assert_allclose(weights.numpy(), np.tile([0.9, 0.1], (3, 1)), atol=1e-6)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("gate", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("num_experts", "top_k"), [(2, 2), (3, 1), (3, 2), (4, 2)])
def test_the_balance_of_a_router_that_is_partly_open_is_that_of_two(
    num_experts, top_k, gate, share
):
    logits_TE = random_logits(num_experts).requires_grad_()
    loss = balance_loss(route_gated(logits_TE, top_k, torch.tensor([gate])), share)
    lead = np.eye(num_experts)[-1] * np.log(9)
    logits = logits_TE.detach().numpy()
    of_all = numpy_balance(logits - lead, top_k, share, logits)
    own = num_experts - 1
    closed = 1.0  # of an expert that is the only one
    if own > 1:
        closed = numpy_balance(logits[:, :-1], min(top_k, own), share)
    assert float(loss.detach()) == pytest.approx(gate * of_all + (1 - gate) * closed, rel=1e-6)
    loss.backward()
    assert gate or not logits_TE.grad[:, -1].any()  # who is shut out is not balanced
