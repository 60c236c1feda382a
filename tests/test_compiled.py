"""What is in C against the PyTorch way in float64."""

from __future__ import annotations

import os
import platform

import pytest
import torch

from comigs import csrc
from comigs.experts import hidden_c, hidden_torch
from comigs.experts.activation import GELU, SILU, by_autograd
from comigs.experts.hidden import mixed_hidden
from comigs.experts.hidden_layer import HiddenLayer, HiddenSettings, Wanted

pytestmark = pytest.mark.skipif(csrc.library() is None, reason="no C compiler")


@pytest.fixture(
    params=["", "-U__AVX512F__ -U__AVX512DQ__", "-mno-avx"],
    ids=["this-processor", "narrower", "narrowest"],
    autouse=True,
)
def processor(request, monkeypatch):
    """What is written for one kind of processor is written for all others, too: with vectors of 256
    bits, and with the 128 that processors of ARM have.
    """
    if request.param == "-mno-avx" and platform.machine() != "x86_64":
        pytest.skip("there is nothing narrower")
    monkeypatch.setenv("CC", f"{os.environ.get('CC', 'cc')} {request.param}")
    csrc.attempt.cache_clear()
    assert csrc.library() is not None
    most = {"": 16, "-mno-avx": 4}.get(request.param, 8)
    assert csrc.number("lanes") <= most
    yield
    csrc.attempt.cache_clear()


WIDTHS = [16, 272, 784]  # one vector; a tile's part; more than a tile
TOKENS = [1, 7, 64, 65, 200]  # less than a group; a block; a block and one


def layer(
    T=65,
    I=272,  # noqa: E741
    ranks=(3, 8, 1),
    top_k=2,
    products=2,
    dtype=torch.float32,
    act=SILU,
    learns=None,
):
    """Random tensors; low as a permuted view, which is not contiguous."""
    torch.manual_seed(0)
    E, R = len(ranks), sum(ranks)
    weights = torch.rand(T, E)
    if top_k < E:
        largest = weights.topk(top_k)
        weights = torch.zeros(T, E).scatter(1, largest.indices, largest.values)
    low, B, A = (
        torch.randn(R, products, T).permute(2, 1, 0),
        torch.randn(products, R, I) / 4,
        torch.randn(R, I) / 4,
    )
    frozen = [torch.randn(T, I).to(dtype) for _ in range(products)]
    settings = HiddenSettings(act, ranks, learns or [True] * E, top_k)
    return HiddenLayer(settings, weights, low, B, A, frozen)


def in_float64(given):
    settings, *tensors, frozen = given
    return HiddenLayer(settings, *(t.double() for t in tensors), [f.double() for f in frozen])


def distance(found, exact):
    return float((found.double() - exact).norm() / exact.norm().clamp(min=1e-30))


def assert_equals_pytorch(given, wanted=(True,) * 4):
    assert hidden_c.takes(given)
    exact = in_float64(given)
    mixed, low = hidden_c.forward(given)
    exact_mixed, exact_low = hidden_torch.forward(exact)
    rounded = 3e-3 if given.frozen[0].dtype == torch.bfloat16 else 1e-6
    assert mixed.dtype == given.frozen[0].dtype
    assert distance(mixed, exact_mixed) < rounded
    assert distance(low, exact_low) < 1e-6

    grad_mixed, grad_low = torch.randn_like(mixed), torch.randn_like(low)
    *found, frozen = hidden_c.backward(given, grad_mixed, grad_low, Wanted(*wanted))
    *expected, exact_frozen = hidden_torch.backward(
        exact, grad_mixed.double(), grad_low.double(), Wanted(*wanted)
    )
    assert [t is not None for t in found] == [t is not None for t in expected] == list(wanted)
    assert all(distance(*pair) < rounded for pair in zip(frozen, exact_frozen, strict=True))
    assert all(
        distance(*pair) < 1e-6 for pair in zip(found, expected, strict=True) if pair[0] is not None
    )
    return found


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_any_number_of_tokens_and_columns(tokens, width):
    assert_equals_pytorch(layer(tokens, width))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", [SILU, GELU])
@pytest.mark.parametrize("products", [1, 2])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_activations_products_and_experts_per_token(top_k, products, act, dtype):
    assert_equals_pytorch(layer(top_k=top_k, products=products, act=act, dtype=dtype))


@pytest.mark.parametrize("left_out", range(4))
def test_only_the_gradients_that_are_wanted(left_out):
    assert_equals_pytorch(layer(), [i != left_out for i in range(4)])


def test_an_expert_that_does_not_learn_has_no_gradient_and_the_others_keep_theirs():
    weights, low, B, A = assert_equals_pytorch(layer())
    of_some = assert_equals_pytorch(layer(learns=[True, False, True]))
    assert torch.equal(of_some[0], weights)
    assert torch.equal(of_some[1], low)
    for some, every in ((of_some[2], B), (of_some[3], A)):
        assert not some[..., 3:11, :].any()
        assert torch.equal(some[..., :3, :], every[..., :3, :])
        assert torch.equal(some[..., 11:, :], every[..., 11:, :])


def test_inputs_that_are_far_out():
    given = layer()
    for f_TI in given.frozen:
        f_TI *= 200
    assert_equals_pytorch(given)


def test_what_is_no_number_stays_none():
    given = layer()
    given.frozen[0][3, 5] = torch.nan
    assert torch.isnan(hidden_c.forward(given)[0]).nonzero().tolist() == [[3, 5]]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_to_the_bit_every_time_with_any_number_of_threads(threads):
    given, before = layer(T=200), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        mixed, low = hidden_c.forward(given)
        runs = [hidden_c.backward(given, mixed, low, Wanted(*[True] * 4)) for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(map(torch.equal, [*runs[0][:4], *runs[0].frozen], [*other[:4], *other.frozen]))
    assert_equals_pytorch(given)


@pytest.mark.parametrize(
    "given",
    [
        layer(I=24),
        layer(act=by_autograd(torch.relu)),
        layer(ranks=(257,), top_k=1),
        in_float64(layer()),
    ],
    ids=["width", "activation", "rank", "float64"],
)
def test_what_c_does_not_take_pytorch_does(given):
    assert not hidden_c.takes(given)
    mixed, _ = mixed_hidden(given)
    assert distance(mixed, hidden_torch.forward(in_float64(given))[0]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1, 15, 16, 97, 8192])
@pytest.mark.parametrize("size", [1, 1e4])
def test_cross_entropy_and_its_gradient(size, vocabulary, dtype):
    torch.manual_seed(0)
    logits = (torch.randn(9, vocabulary) * size).to(dtype)
    targets = torch.randint(vocabulary, (9,))
    targets[:2] = torch.tensor([0, vocabulary - 1])
    exact = logits.double().requires_grad_()
    nats = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
    (gradient,) = torch.autograd.grad(nats.sum(), exact)
    before = logits.clone()
    torch.testing.assert_close(
        csrc.cross_entropy(logits, targets, False).double(), nats, rtol=1e-6, atol=1e-6
    )
    assert torch.equal(logits, before)
    found = csrc.cross_entropy(logits, targets, True)
    torch.testing.assert_close(found.double(), nats, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        logits.double(), gradient, rtol=4e-3 if dtype == torch.bfloat16 else 1e-5, atol=1e-7
    )


@pytest.mark.parametrize("target", [-1, 97])
def test_a_target_that_is_no_column_is_refused(target):
    with pytest.raises(
        IndexError, match=f"targets from -?\\d+ to {max(target, 3)}, but logits have 97 columns"
    ):
        csrc.cross_entropy(torch.randn(2, 97), torch.tensor([3, target]), False)
