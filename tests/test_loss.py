"""Chunked cross-entropy: the same numbers as the plain one, without ever holding all tokens'
logits.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from comigs.bases.load import architecture_of
from comigs.client import loss as loss_module
from comigs.client.loss import Windows, sum_cross_entropy
from tests.conftest import attach, copy_of, random_tensors, shape_of, tiny
from tests.families import CONFIGS, built

ROWS = 100  # tokens in a chunk here, so that small batches have several


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK", ROWS * 257)


def batch(vocabulary, windows=14, length=23):
    """322 tokens: several chunks, the last one shorter."""
    random = torch.Generator().manual_seed(4)
    return (torch.randint(vocabulary, (windows, length), generator=random) for _ in range(2))


def losses_and_gradients(attachment, tensors, inputs, targets, dtype):
    """(ours, plain): each the loss, and its gradient to all trained tensors for a factor of 0.7."""
    results = []
    for plain in (False, True):
        trained = {slot: t.requires_grad_() for slot, t in copy_of(tensors).items()}
        attachment.bind(trained)
        if plain:
            logits = attachment.model(inputs).logits.to(dtype)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        else:
            loss = sum_cross_entropy(attachment.model, Windows(inputs, targets))
        (0.7 * loss).backward()
        results.append((loss.detach(), {slot: t.grad for slot, t in trained.items()}))
    return results


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_value_and_gradient_equal_plain_cross_entropy(model_type, dtype, tolerance):
    """Gemmas cap their logits (final_logit_softcapping), Granite divides them (logits_scaling)."""
    model = built(model_type).to(dtype)
    inputs, targets = batch(97)
    assert inputs.numel() > ROWS * 257 // 97 and inputs.numel() % (ROWS * 257 // 97)
    with attach(model, architecture_of(model)) as attachment:
        tensors = random_tensors(attachment, shape_of(1, 1), routed=True, dtype=dtype)
        (ours, our_gradients), (plain, gradients) = losses_and_gradients(
            attachment, tensors, inputs, targets, dtype
        )
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, plain, rtol=tolerance / 10, atol=0)
    for slot, gradient in gradients.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            our_gradients[slot], gradient, rtol=0, atol=10 * tolerance * max(scale, 1e-3)
        )


def test_a_cap_on_the_logits_is_not_forgotten():
    assert CONFIGS["gemma3_text"].final_logit_softcapping == 0.5
    torch.manual_seed(0)
    capped = AutoModelForCausalLM.from_config(CONFIGS["gemma3_text"]).eval()
    inputs, targets = batch(97)
    with torch.no_grad():
        loss = sum_cross_entropy(capped, Windows(inputs, targets))
        capped.config.final_logit_softcapping = None
        assert abs(loss - sum_cross_entropy(capped, Windows(inputs, targets))) > 1e-3 * loss
        capped.config.final_logit_softcapping = 0.5


class LargestLogits(TorchDispatchMode):
    """Records the most rows of any tensor that is as wide as the vocabulary."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.most = vocabulary, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[-1] == self.vocabulary:
                self.most = max(self.most, leaf.numel() // self.vocabulary)
        return result


@pytest.mark.parametrize("wants_gradient", [True, False])
def test_no_more_than_a_chunk_of_logits_exists_at_once(wants_gradient):
    base = tiny("tiny-gpt2")
    inputs, targets = batch(257, 24, 32)
    with attach(base.model, base.architecture) as attachment:
        tensors = random_tensors(attachment, shape_of(1, 1), routed=True)
        attachment.bind({slot: t.requires_grad_(wants_gradient) for slot, t in tensors.items()})
        with LargestLogits(257) as ours:
            loss = sum_cross_entropy(attachment.model, Windows(inputs, targets))
            if wants_gradient:
                loss.backward()
        with LargestLogits(257) as plain:
            attachment.model(inputs)
    assert ROWS // 2 < ours.most <= ROWS
    assert plain.most == inputs.numel() > 7 * ROWS  # what the recorder would have seen


def test_the_frozen_head_gets_no_gradient():
    base = tiny("tiny-gpt2")
    inputs, targets = batch(257)
    with attach(base.model, base.architecture) as attachment:
        tensors = random_tensors(attachment, shape_of(1, 1), routed=True)
        attachment.bind({slot: t.requires_grad_() for slot, t in tensors.items()})
        sum_cross_entropy(attachment.model, Windows(inputs, targets)).backward()
    assert all(p.grad is None for p in base.model.parameters())


def test_under_autocast_the_loss_is_summed_in_float32_from_bfloat16_logits():
    base = tiny("tiny-llama")
    inputs, targets = batch(257)
    with (
        attach(base.model, base.architecture) as attachment,
        torch.autocast("cpu", torch.bfloat16),
        torch.no_grad(),
    ):
        attachment.bind(random_tensors(attachment, shape_of(1, 1), routed=True))
        loss = sum_cross_entropy(attachment.model, Windows(inputs, targets))
        plain = F.cross_entropy(
            attachment.model(inputs, use_cache=False).logits.float().flatten(0, 1),
            targets.flatten(),
            reduction="sum",
        )
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
