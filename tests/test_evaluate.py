"""Evaluation: every token once, whatever the batch size, and nothing is left changed."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from comigs.bases.gpt2 import ARCHITECTURE
from comigs.client.evaluate import Measurement, evaluate
from tests.conftest import attach, random_tensors, run_config, same, shape_of, start_engine, tiny
from tests.test_data_helper import build, stream_of

TEXTS = ["the first document, which is some windows long", "é", "and a third one: ünïcode"]
OTHER = ["another store, of another client", "with two texts in it"]
LENGTH = 11


@pytest.fixture
def stores(tmp_path):
    return [build(tmp_path, TEXTS), build(tmp_path, OTHER)]


def log_probabilities(model, texts):
    """ln p of every token but the first, one window after the other, one token after the other."""
    stream, found = stream_of(texts), []
    for start in range(0, len(stream) - 1, LENGTH):
        targets = stream[start + 1 : start + 1 + LENGTH]
        logits_LV = model(torch.tensor([stream[start : start + len(targets)]])).logits[0].double()
        for logits_V, target in zip(logits_LV, targets, strict=True):
            found.append(float(logits_V[target] - torch.log(torch.exp(logits_V).sum())))
    assert len(found) == len(stream) - 1
    return found


@pytest.mark.parametrize("routed", [True, False])
def test_nats_are_the_sum_over_all_tokens_of_their_log_probabilities(base, stores, routed):
    with attach(base.model, base.architecture) as attachment, torch.no_grad():
        attachment.bind(random_tensors(attachment, shape_of(1, 2), routed))
        result = evaluate(attachment, stores, LENGTH, 4, torch.float32)
        expected = log_probabilities(base.model, TEXTS) + log_probabilities(base.model, OTHER)
    assert (
        result.tokens == len(expected) == sum(len(stream_of(texts)) - 1 for texts in (TEXTS, OTHER))
    )
    assert result.bytes == sum(len(text.encode()) for text in TEXTS + OTHER)
    assert result.nats == pytest.approx(-sum(expected), rel=1e-6)
    assert result.nats_per_token == pytest.approx(-np.mean(expected), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(-np.mean(expected)), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(
        -sum(np.array(expected) / math.log(2)) / result.bytes, rel=1e-6
    )
    assert (result.expert_share_LE is not None) == routed


def test_the_batch_size_changes_nothing(base, stores):
    with attach(base.model, base.architecture) as attachment:
        attachment.bind(random_tensors(attachment, shape_of(1, 2), routed=True))
        results = [
            evaluate(attachment, stores, LENGTH, size, torch.float32) for size in (1, 2, 3, 100)
        ]
    for result in results[1:]:
        assert result.nats == pytest.approx(results[0].nats, rel=1e-6)
        assert (result.tokens, result.bytes) == (results[0].tokens, results[0].bytes)
        np.testing.assert_allclose(
            result.expert_share_LE, results[0].expert_share_LE, rtol=0, atol=1e-6
        )


def test_expert_shares_are_the_mean_routing_weights_over_all_tokens(base, stores):
    with attach(base.model, base.architecture) as attachment:
        attachment.bind(random_tensors(attachment, shape_of(1, 2), routed=True))
        weights = [[] for _ in attachment.mixtures]
        for layer, mixture in enumerate(attachment.mixtures):
            mixture.register_forward_hook(
                lambda m, _i, _o, seen=weights[layer]: seen.append(m.routing.weights_TE)
            )
        result = evaluate(attachment, stores, LENGTH, 4, torch.float32)
    expected = [torch.cat(seen).double().mean(dim=0).tolist() for seen in weights]
    np.testing.assert_allclose(result.expert_share_LE, expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.sum(result.expert_share_LE, axis=1), 1, rtol=0, atol=1e-6)


def test_unbound_it_is_the_base_that_is_evaluated(base, stores):
    with torch.no_grad():
        expected = -sum(log_probabilities(base.model, TEXTS))
    with attach(base.model, base.architecture) as attachment:
        result = evaluate(attachment, stores[:1], LENGTH, 4, torch.float32)
    assert result.nats == pytest.approx(expected, rel=1e-6) and result.expert_share_LE is None


def test_modes_and_random_generators_stay_as_found(stores):
    """With dropout in the model, which must not act."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=257, n_positions=64, n_embd=16, n_layer=2, n_head=2
    )  # dropout 0.1
    model = GPT2LMHeadModel(config).requires_grad_(False)
    with attach(model, ARCHITECTURE) as attachment:
        tensors = random_tensors(attachment, shape_of(1, 1), routed=True)
        attachment.bind(tensors)
        expected = evaluate(attachment, stores, LENGTH, 4, torch.float32)
        for seed, module in enumerate(model.modules()):
            module.training = bool(seed % 3)
        modes = [module.training for module in model.modules()]
        assert True in modes and False in modes
        before = torch.get_rng_state(), np.random.get_state(), random.getstate()
        result = evaluate(attachment, stores, LENGTH, 4, torch.float32)
        assert result == expected
        assert torch.equal(before[0], torch.get_rng_state()) and before[2] == random.getstate()
        assert all(
            np.array_equal(a, b) for a, b in zip(before[1], np.random.get_state(), strict=True)
        )
        assert [module.training for module in model.modules()] == modes
        assert all(t.grad is None and not t.requires_grad for t in tensors.values())


def test_modes_are_put_back_after_an_error_too(stores):
    base = tiny("tiny-gpt2")
    base.model.transformer.train()
    with attach(base.model, base.architecture) as attachment:
        modes = [module.training for module in base.model.modules()]
        with pytest.raises(IndexError):
            evaluate(attachment, stores, 100, 4, torch.float32)  # longer than the base can read
        assert [module.training for module in base.model.modules()] == modes


def test_evaluating_a_client_changes_none_of_its_tensors_or_training(tmp_path):
    plain, evaluated = (start_engine(run_config(tmp_path)).clients["ada"] for _ in range(2))
    for round in (1, 2):
        for client in (plain, evaluated):
            client.train(round, lambda level, nats: None)
            if client is evaluated:
                for split in ("train", "valid", "test"):
                    client.evaluate(split)
                    client.evaluate(split, untouched_base=True)
    for part in ("experts", "optimizer"):
        assert same(plain.state()[part], evaluated.state()[part])


def test_perplexity_of_a_hopeless_model_is_still_a_number():
    assert math.isfinite(
        Measurement(nats=1e9, tokens=10, bytes=10, expert_share_LE=None).perplexity
    )


def test_in_bfloat16_figures_are_close_to_float32(base, stores):
    with attach(base.model, base.architecture) as attachment:
        attachment.bind(random_tensors(attachment, shape_of(1, 1), routed=True))
        exact, low = (
            evaluate(attachment, stores, LENGTH, 4, dtype)
            for dtype in (torch.float32, torch.bfloat16)
        )
    assert low.nats == pytest.approx(exact.nats, rel=0.01) and low.nats != exact.nats
