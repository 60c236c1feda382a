"""At the very end a client keeps its mixture, or what its valid says is better: one expert of it
alone, its attention alone, or the base.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from comigs.app import api
from comigs.client.client import Client
from comigs.client.evaluate import measure
from comigs.data.batches import evaluation_windows
from comigs.methods.alone import best_on_valid, candidates, most_candidates, with_every_expert
from comigs.runs.report.page import report_page
from comigs.runs.report.read import read_run
from comigs.slots import Slot
from tests.conftest import (
    APART,
    WORDS,
    attach,
    random_tensors,
    run_config,
    same,
    shape_of,
    start_engine,
    tiny,
)


def logits(attachment, tensors):
    attachment.bind(tensors)
    x = torch.arange(24).reshape(2, 12) % attachment.model.config.vocab_size
    with torch.no_grad():
        return attachment.model(x, use_cache=False).logits


@pytest.mark.parametrize("part", ["g0", "s0", "s1"])
@pytest.mark.parametrize("base", ["tiny-gpt2", "tiny-llama"])
def test_every_expert_a_copy_of_one_is_that_one_without_a_router(base, part):
    base = tiny(base)
    with attach(base.model, base.architecture) as attachment:
        tensors = random_tensors(attachment, shape_of(1, 2), routed=True)
        copied = with_every_expert(tensors, part)
        single = {
            replace(slot, part="g0") if slot.part == part else slot: tensor
            for slot, tensor in tensors.items()
            if slot.part in (part, "attention")
        }
        torch.testing.assert_close(logits(attachment, copied), logits(attachment, single))
        assert not torch.allclose(logits(attachment, copied), logits(attachment, tensors))


def test_the_last_candidates_are_the_attention_alone_and_the_base():
    base = tiny("tiny-gpt2")
    with attach(base.model, base.architecture) as attachment:
        tensors = random_tensors(attachment, shape_of(1, 1), routed=True)
        *_, (attention_alone, _), (nothing, _) = candidates(tensors)
        attention = {slot: tensor for slot, tensor in tensors.items() if slot.part == "attention"}
        of_attention, of_base = logits(attachment, attention), logits(attachment, {})
        torch.testing.assert_close(logits(attachment, attention_alone), of_attention)
        torch.testing.assert_close(logits(attachment, nothing), of_base)
        assert not torch.allclose(of_attention, of_base)


def test_experts_of_other_ranks_are_not_copied_over_each_other():
    base = tiny("tiny-gpt2")
    with attach(base.model, base.architecture) as attachment:
        tensors = random_tensors(attachment, shape_of(1, 1, 3, 2), routed=True)
    assert with_every_expert(tensors, "g0") is None
    assert len(list(candidates(tensors))) == 3


@pytest.mark.parametrize("best", range(5))
def test_it_is_the_lowest_on_valid_and_of_equal_ones_the_whole(best):
    base = tiny("tiny-gpt2")
    with attach(base.model, base.architecture) as attachment:
        tensors = random_tensors(attachment, shape_of(1, 1), routed=True)
    models = list(candidates(tensors))
    assert len(models) == most_candidates(2) == 5
    names = [None, "generalist 0", "specialist 0", "attention LoRA", "base"]
    assert [name for _, name in models] == names
    nats = iter([3.0 - (number == best) for number in range(5)])
    chosen, name = best_on_valid(tensors, lambda t: next(nats))
    assert same(chosen, models[best][0]) and name == names[best]
    whole, name = best_on_valid(tensors, lambda t: 3.0)
    assert whole is tensors and name is None


def config_of(root, finish="valid", options=APART, **tree):
    """A run whose clients learn one thing and want another, so that most of what they learn harms
    them.
    """
    entries = {}
    for name, wanted in zip(("ada", "bob"), ("cyd", "dan"), strict=True):
        words = WORDS[wanted].split()
        for split in ("valid", "test"):
            folder = root / f"{name}-{split}"
            folder.mkdir(exist_ok=True)
            text = " ".join(words[(3 * k * k + k) % len(words)] for k in range(60))
            (folder / "page.txt").write_text(f"{split}: {text}", encoding="utf-8")
        splits = {"train": name, "valid": f"{name}-valid", "test": f"{name}-test"}
        entries[name] = {"text": splits}
    options = {"finish": finish, **options}
    return run_config(root, entries=entries, rounds=4, options=options, **tree)


def personal(folder, name):
    saved = safetensors.torch.load_file(folder.path / "clients" / name / "personal.safetensors")
    return {Slot.parse(key): tensor for key, tensor in saved.items()}


@pytest.mark.parametrize(("keep", "options"), [("best", {}), ("last", APART), ("best", APART)])
@pytest.mark.few(2)
def test_a_client_ends_with_the_part_of_its_own_model_that_is_best_on_valid(
    tmp_path, keep, options
):
    tree = {"client": {"lr": 0.02, "steps": 6}, "evaluation": {"keep": keep}, "options": options}
    mixture = api.run(config_of(tmp_path, finish="mixture", **tree), tmp_path / "mixture")
    chosen = api.run(config_of(tmp_path, **tree), tmp_path / "chosen")
    before, after = mixture.summary().clients, chosen.summary().clients
    clients, measured = start_engine(mixture.config()).clients, api.evaluate(chosen.path)
    ends = {}
    for name, client in clients.items():
        length, batch = client.config.data.sequence_length, 8
        windows = list(evaluation_windows(client.data.valid, length, batch))
        models = list(candidates(personal(mixture, name)))
        nats = [client._nats(model, windows) for model, _ in models]
        model, ends[name] = models[nats.index(min(nats))]
        assert same(personal(chosen, name), model)
        assert after[name].kept_part == ends[name] and before[name].kept_part is None
        # The whole model says itself how much of its download it did not adopt.
        if not options:
            (gate,) = {float(t) for slot, t in personal(mixture, name).items() if slot.is_gate}
            assert before[name].adopted_share == pytest.approx(1 - gate)
        assert after[name].adopted_share == before[name].adopted_share is not None
        # What is reported is that model, and the round that it is of is the same.
        assert after[name].kept_round == before[name].kept_round
        assert measured[name]["personal"]["perplexity"] == pytest.approx(
            after[name].test.perplexity, rel=1e-6
        )
    assert any(ends.values())  # else nothing is shown here
    page = report_page(read_run(chosen.path))
    for part in filter(None, ends.values()):
        assert f"one part: {part}" in page


def test_a_model_that_gives_no_number_at_the_end_is_not_kept(tmp_path):
    config = run_config(tmp_path, "ada", options=APART)
    client = start_engine(config).clients["ada"]
    for slot, tensor in client.train_state.tensors.items():
        if slot.role in ("generalist", "specialist"):
            tensor.fill_(1e30)
    assert math.isnan(measured_nats(client))
    client.finish()
    base = client.evaluate("valid", untouched_base=True).nats_per_token
    assert client.evaluate("valid").nats_per_token == pytest.approx(base, rel=1e-6)


def test_a_download_that_gives_no_number_is_not_adopted(tmp_path):
    options = {"specialists": "apart", "probe_windows": 2}
    client = start_engine(run_config(tmp_path, "ada", options=options)).clients["ada"]
    own = {slot: tensor.clone() for slot, tensor in client.train_state.tensors.items()}
    download = {slot: t for slot, t in own.items() if client.method.receives(slot)}
    for slot, tensor in own.items():
        if slot.role == "generalist":
            download[slot] = torch.full_like(tensor, 1e30)
    client.receive(download)
    assert client.adopted_share == 0 and same(client.train_state.tensors, own)


def test_at_the_end_a_batch_of_valid_is_in_memory_at_a_time(tmp_path, monkeypatch):
    config = run_config(tmp_path, "ada", evaluation={"batch_size": 1})
    client = start_engine(config).clients["ada"]
    drawn, measured = [], []

    def windows(*of_what):
        for batch in evaluation_windows(*of_what):
            drawn.append(batch)
            yield batch

    def nats(client, tensors, of_valid):
        assert not drawn  # nothing was read before it is measured
        measured.append(sum(batch.num_learnt for batch in of_valid))
        drawn.clear()
        return 3.0

    monkeypatch.setattr("comigs.client.client.evaluation_windows", windows)
    monkeypatch.setattr(Client, "_nats", nats)
    client.finish()
    assert len(measured) > 3 and len(set(measured)) == 1 and measured[0] > 0


def measured_nats(client):
    """What the client's own model gives on its valid, where that may be no number."""
    client.attachment.bind(client.train_state.tensors)
    windows = evaluation_windows(client.data.valid, client.config.data.sequence_length, 8)
    return measure(client.attachment, windows, client.base.dtype).nats_per_token
