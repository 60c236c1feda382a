"""Chats packed into windows are learnt as if each were read alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from comigs.bases.load import architecture_of
from comigs.client.balance_loss import batch_densities
from comigs.client.evaluate import measure
from comigs.client.loss import Windows, micro_batches, sum_cross_entropy, windows_on
from comigs.data.batches import (
    Batch,
    Fold,
    evaluation_windows,
    fold_windows,
    joined,
    sample_windows,
    single_examples,
)
from comigs.data.corpus import TokenStore
from comigs.data.examples import IGNORED, LEARNT, ExampleStore, best_fit
from tests.conftest import attach, random_tensors, shape_of, tiny

FAMILIES = {  # a family of ours -> a tiny model made of its own config
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma3_text": {
        "head_dim": 8,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
        "final_logit_softcapping": 20.0,
    },
}
LLAMA_LIKE = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
LENGTH = 30


def model_of(family: str, attention: str):
    sizes = FAMILIES[family] if family == "gpt2" else LLAMA_LIKE | FAMILIES[family]
    config = AutoConfig.for_model(
        family, vocab_size=257, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **sizes
    )
    config.pad_token_id = None
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.eval().requires_grad_(False)


def store_of(sizes, whole=False, seed=0) -> ExampleStore:
    """Examples of these numbers of tokens, each with an answer at its end and one inside."""
    random = np.random.default_rng(seed)
    marks = []
    for size in sizes:
        learnt = random.random(size) < 0.4
        learnt[0], learnt[-1] = False, True
        marks.append(np.where(learnt, LEARNT, 0) + 1)
    tokens = random.integers(0, 257, sum(sizes)).astype(np.uint16)
    return ExampleStore(
        Path("nowhere"), tokens, sum(sizes), len(sizes), "", "",
        np.concatenate(marks).astype(np.uint16), np.cumsum(sizes), whole,
    )  # fmt: skip


def naive_nats(model, store: ExampleStore, length: int) -> torch.Tensor:
    """The nats of what is learnt, one example after the other, by transformers and torch alone."""
    total = torch.zeros(())
    start = 0
    for end in store.ends.tolist():
        ids = torch.from_numpy(store.tokens[start:end].astype(np.int64))[: length + 1]
        learnt = torch.from_numpy(store.marks[start:end] >= LEARNT)[: length + 1][1:]
        logits = model(ids[None, :-1], use_cache=False).logits[0].float()
        nats = F.cross_entropy(logits, ids[1:], reduction="none")
        total = total + nats[torch.ones_like(learnt) if store.whole else learnt].sum()
        start = end
    return total


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("routing", ["token", "sequence"])
def test_packed_examples_have_the_loss_and_the_gradients_of_examples_alone(
    family, attention, routing
):
    """For every family of ours, with experts and a router on it."""
    model = model_of(family, attention)
    attachment = attach(model, architecture_of(model), routing=routing)
    tensors = random_tensors(attachment, shape_of(1, 2), True)
    for tensor in tensors.values():
        tensor.requires_grad_(True)
    attachment.bind(tensors)
    store = store_of([9, 4, 23, 2, 13, 40, 7, 5])
    (batch,) = evaluation_windows([store], LENGTH, 100)
    assert len(batch.inputs) < len(store.ends)  # some windows do hold several
    packed = sum_cross_entropy(model, windows_on(torch.device("cpu"), batch))
    alone = naive_nats(model, store, LENGTH)
    assert float(packed.detach()) == pytest.approx(float(alone.detach()), rel=1e-5)
    ours = torch.autograd.grad(packed, list(tensors.values()))
    theirs = torch.autograd.grad(alone, list(tensors.values()))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()) + 1e-6)


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
@pytest.mark.parametrize("whole", [False, True])
def test_a_measurement_counts_every_answer_token_once_whatever_windows_it_is_in(name, whole):
    base = tiny(name)
    store = store_of([9, 4, 23, 2, 13, 40, 7, 5], whole)
    with attach(base.model, base.architecture) as attachment:
        attachment.bind({})
        expected = float(naive_nats(base.model, store, LENGTH))
        for batches in (
            evaluation_windows([store], LENGTH, 1),
            evaluation_windows([store], LENGTH, 3),
        ):
            found = measure(attachment, batches, base.dtype)
            assert found.nats == pytest.approx(expected, rel=1e-5)
            assert found.tokens == store.num_learnt(LENGTH)
    alone = sum(float(len(b.targets[0][b.targets[0] != IGNORED])) for b in single(store))
    assert alone == store.num_learnt(LENGTH)
    learnt = sum(
        int((store.marks[s + 1 : min(s + 1 + LENGTH, e)] >= (0 if whole else LEARNT)).sum())
        for s, e in zip(store.starts, store.ends, strict=True)
    )
    assert learnt == store.num_learnt(LENGTH) == store.measured_bytes(LENGTH)  # a byte a token


def single(store):
    return list(single_examples([store], LENGTH))


def test_without_positions_examples_would_read_each_other():
    """The test above could fail."""
    base, store = tiny("tiny-llama"), store_of([9, 4, 13])
    (batch,) = evaluation_windows([store], LENGTH, 9)
    windows = windows_on(base.device, batch)
    flat = torch.arange(windows.inputs.shape[1]).expand_as(windows.inputs)
    apart = sum_cross_entropy(base.model, windows)
    mixed = sum_cross_entropy(base.model, windows._replace(positions=flat))
    assert abs(float(apart - mixed)) > 1e-3 * float(apart)


def test_every_example_is_in_one_window_whole_or_cut_at_its_end():
    sizes = np.random.default_rng(1).integers(2, 45, 300).tolist()
    store = store_of(sizes)
    windows = store.packed(LENGTH)
    assert sorted(n for window in windows for n in window) == list(range(300))
    batches = list(evaluation_windows([store], LENGTH, 1))
    for window, (inputs, targets, positions) in zip(windows, batches, strict=True):
        assert positions is not None and inputs.shape[1] <= LENGTH
        at = 0
        for number in window:
            start, size = int(store.starts[number]), min(sizes[number] - 1, LENGTH)
            assert inputs[0, at : at + size].tolist() == store.tokens[start : start + size].tolist()
            learnt = store.marks[start + 1 : start + 1 + size] >= LEARNT
            tokens = store.tokens[start + 1 : start + 1 + size].astype(np.int64)
            wanted = np.where(learnt, tokens, IGNORED)
            assert targets[0, at : at + size].tolist() == wanted.tolist()
            assert positions[0, at : at + size].tolist() == list(range(size))
            at += size
        assert at == inputs.shape[1]
    # Little room is wasted: 60 windows would hold all if nothing were.
    filled = sum(min(size - 1, LENGTH) for size in sizes)
    assert len(windows) * LENGTH < 1.1 * filled
    assert store.num_cut(LENGTH) == sum(size - 1 > LENGTH for size in sizes) > 0


def test_best_fit_is_the_naive_one():
    random = np.random.default_rng(3)
    for _ in range(20):
        sizes, left = random.integers(1, 20, 60).tolist(), []
        for size in sizes:
            fits = [room for room in left if room >= size]
            if fits:
                left.remove(min(fits))
            left.append((min(fits) if fits else 24) - size)
        found = best_fit(sizes, 24)
        assert sorted(24 - sum(sizes[p] for p in window) for window in found) == sorted(left)
        assert sorted(p for window in found for p in window) == list(range(60))


def test_an_example_that_has_nothing_to_learn_before_a_windows_end_is_left_out():
    store = store_of([9, 50, 13])
    marks = store.marks.copy()
    marks[9:58] = 1  # of the second one, only the last token is an answer
    late = ExampleStore(
        Path("nowhere"), store.tokens, 72, 3, "", "", marks, store.ends, False
    )  # fmt: skip
    assert sorted(n for window in late.packed(LENGTH) for n in window) == [0, 2]
    assert (late.num_left_out(LENGTH), late.num_cut(LENGTH)) == (1, 1)
    assert (late.num_left_out(60), late.num_cut(60)) == (0, 0)
    tokens = sum(batch.num_learnt for batch in evaluation_windows([late], LENGTH, 2))
    assert tokens == late.num_learnt(LENGTH)


def test_micro_batches_of_chats_count_each_answer_token_alike():
    base, store = tiny("tiny-llama"), store_of([9, 4, 23, 2, 13, 40, 7, 5])
    (batch,) = evaluation_windows([store], LENGTH, 100)
    parts = list(micro_batches(batch, 1, base.device))
    whole = float(sum_cross_entropy(base.model, windows_on(base.device, batch)))
    assert sum(float(sum_cross_entropy(base.model, part)) for part in parts) == pytest.approx(whole)
    attachment = attach(base.model, base.architecture, top_k=1)
    attachment.bind(random_tensors(attachment, shape_of(1, 2), True))
    densities = batch_densities(attachment, parts, base.dtype)
    sum_cross_entropy(base.model, windows_on(base.device, batch))
    learnt = torch.from_numpy(batch.targets.flatten() != IGNORED)
    for density, routing in zip(densities, attachment.routings(), strict=True):
        counted = routing.selected_TE[learnt].double().mean(dim=0)
        assert torch.allclose(density, counted)


def test_folds_of_chats_share_no_example():
    store = store_of(np.random.default_rng(1).integers(2, 30, 80).tolist())
    for number in range(4):
        seen = {}
        for inside in (True, False):
            random = np.random.default_rng(number)
            batch = fold_windows([store], random, 200, LENGTH, Fold(number, 4, inside))
            seen[inside] = {row.tobytes() for row in batch.inputs}
        assert seen[True] and seen[False] and not seen[True] & seen[False]
        assert len(seen[True] | seen[False]) == len(store.packed(LENGTH))


def test_chats_and_text_can_be_in_one_batch():
    """As where the text of all clients is in one place."""
    base, chats = tiny("tiny-gpt2"), store_of([9, 4, 23])
    text = TokenStore(Path("nowhere"), np.arange(200).astype(np.uint16), 200, 1, "", "")
    batch = sample_windows([chats, text], np.random.default_rng(0), 12, LENGTH)
    assert batch.positions is not None and 12 * LENGTH > batch.num_learnt > LENGTH
    (alone,) = sample_windows([text], np.random.default_rng(0), 1, LENGTH)[:1]
    one = Batch(alone, alone + 1)
    two = joined([one, next(evaluation_windows([chats], LENGTH, 1))])
    first = Windows(*(torch.from_numpy(part[:1]) for part in two))
    assert float(sum_cross_entropy(base.model, first)) == pytest.approx(
        float(sum_cross_entropy(base.model, windows_on(base.device, one))), rel=1e-5
    )
