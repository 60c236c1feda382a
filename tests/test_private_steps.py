"""The shared phase: what one document can change, and what it is without noise and clip."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch

from comigs.client.loss import sum_cross_entropy, windows_on
from comigs.client.private_steps import clipped_sum
from comigs.client.state import new_train_state
from comigs.client.steps import MethodHooks, local_round
from comigs.data.batches import joined
from comigs.data.documents import Documents
from comigs.data.sampling import BatchSource
from comigs.seeds import generator
from tests.chats import PLAIN, questions, write_lines
from tests.conftest import run_config, same, start_engine

SHARED = ("generalist", "attention")
WORDS = "engine number table note wheel loom paint cloud tree river brush stage"
CPU = torch.device("cpu")


def quiet(*_):
    pass


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("private")
    words = WORDS.split()
    for number, split in enumerate(("train", "valid", "test")):
        texts = [f"{a} {number} {b}" for a, b in zip(words, words[3:], strict=False)]
        write_lines(folder / f"{split}.jsonl", [{"text": text} for text in texts])
    return folder


def started(root, method="comigs", **privacy):
    """One client whose nine documents in train are all shorter than a window."""
    settings = {"level": "document", "delta": 1e-3, "noise_seed": 5, **privacy}
    return start_engine(
        run_config(
            root,
            "ada",
            {"ada": {"text": {split: f"{split}.jsonl" for split in ("train", "valid", "test")}}},
            method=method,
            privacy=settings,
            data={"sequence_length": 30},
            client={"steps": 3, "router_every": 3, "lr": 2e-2},
        )
    )


def documents_of(client):
    (store,) = client.data.train
    return Documents(store, client.config.data.sequence_length)


def windows_of(client):
    random = np.random.default_rng(0)
    documents = documents_of(client)
    return [documents.window(number, random) for number in range(len(documents))]


def private_phase(attachment, client, own, text=None):
    """Train a client's own model as ever, its own copy of what is shared as well."""
    config, state = client.config, new_train_state(own, client.config.client)
    random = partial(generator, config.seed, "batch", client.name)
    length = config.data.sequence_length
    source = BatchSource(text or client.text, client.step_settings.client, length, random)
    attachment.bind(own)
    local_round(
        attachment,
        state,
        client.step_settings,
        lambda level, number: source.batch(level, number, state.local_steps),
        MethodHooks(lambda slot: not slot.is_frozen),
        quiet,
    )


def test_without_noise_and_clip_it_is_two_ordinary_phases_to_the_bit(root):
    run, number = started(root, noise_multiplier=0.0, clip=1e30, expected_batch=9), 9
    client, attachment = run.clients["ada"], run.attachment
    assert len(windows_of(client)) == number
    own = {slot: tensor.clone() for slot, tensor in client.train_state.tensors.items()}

    # The shared phase, as anybody would write it: the mean over documents of a mean over tokens.
    shared = {s: t.clone() for s, t in own.items() if s.role in SHARED}
    params = [shared[slot] for slot in sorted(shared)]
    adam = torch.optim.AdamW(
        params, betas=client.config.client.betas, weight_decay=0.01, fused=True
    )
    attachment.bind(shared)
    for step in range(3):
        for tensor in params:
            tensor.requires_grad_(True)
            tensor.grad = None
        for batch in windows_of(client):
            assert batch.inputs.shape[1] <= 30
            nats = sum_cross_entropy(attachment.model, windows_on(CPU, batch))
            (nats / batch.inputs.size).backward()
        for tensor in params:
            tensor.grad /= number
        adam.param_groups[0]["lr"] = client.step_settings.rate("experts", step)
        adam.step()
        for tensor in params:
            tensor.requires_grad_(False)
    private_phase(attachment, client, own)

    client.train(1, quiet)
    assert same(client.send(1), shared)
    assert same(client.train_state.tensors, own)
    assert not same(client.send(1), {slot: own[slot] for slot in shared})


def gradients_sum(attachment, tensors, windows, clip):
    """The clipped sum of what is shared, with whatever of `tensors` in the forward pass."""
    learning = [tensors[slot] for slot in sorted(tensors) if slot.role in SHARED]
    attachment.bind(tensors)
    for tensor in learning:
        tensor.requires_grad_(True)
    sums, _ = clipped_sum(attachment, learning, windows, clip, torch.float32)
    for tensor in learning:
        tensor.requires_grad_(False)
    return torch.cat([total.flatten() for total in sums])


class Without(Documents):
    """All documents of a store but one."""

    def __init__(self, store, length, gone):
        super().__init__(store, length)
        self.gone = gone

    def __len__(self):
        return super().__len__() - 1

    def window(self, number, random):
        return super().window(number + (number >= self.gone), random)


def test_one_document_changes_a_step_by_the_clip_and_through_the_mixture_by_more(root):
    """PRIVACY.md 1: to clip and noise the generalists' gradient alone is not enough."""
    clip = 1e-3
    run = started(root, noise_multiplier=1.0, clip=clip, expected_batch=2)
    client, attachment = run.clients["ada"], run.attachment
    windows, start = windows_of(client), dict(client.train_state.tensors)
    # Generalists that have learnt something, so that the router has a choice to make.
    draw = torch.Generator().manual_seed(1)
    for slot, tensor in start.items():
        if slot.role in SHARED and slot.matrix == "B":
            start[slot] = torch.randn(tensor.shape, generator=draw) * 0.1

    def after_private_phase(text):
        """What all the text has made of specialists and router, a document more or less."""
        own = {slot: tensor.clone() for slot, tensor in start.items()}
        state, settings = new_train_state(own, client.config.client), client.step_settings
        attachment.bind(own)
        hooks = MethodHooks(lambda slot: slot.role not in SHARED and not slot.is_frozen)
        all_of_it = [w._replace(positions=np.arange(w.inputs.shape[1])[None]) for w in text]
        for _ in range(8):
            local_round(attachment, state, settings, lambda *_: joined(all_of_it), hooks, quiet)
        return own

    right, wrong, both = [], [], after_private_phase(windows)
    only_shared = {slot: tensor for slot, tensor in both.items() if slot.role in SHARED}
    for gone in range(3):
        left = windows[:gone] + windows[gone + 1 :]
        neighbour = after_private_phase(left)
        before = gradients_sum(attachment, both, windows, clip)
        after = gradients_sum(attachment, neighbour, left, clip)
        wrong.append(float((before - after).norm()))

        # The client's own phase: specialists and router are there, and not in the forward pass.
        shared = {slot: neighbour[slot] for slot in only_shared}
        before = gradients_sum(attachment, only_shared, windows, clip)
        after = gradients_sum(attachment, shared, left, clip)
        right.append(float((before - after).norm()))
    assert max(right) <= clip * (1 + 1e-5) and min(right) > 0.5 * clip  # clipped, all of them
    assert max(wrong) > 1.2 * clip, (right, wrong)


def test_what_is_sent_does_not_know_of_specialists_and_router(root):
    """With the same noise, a client sends the same whatever its own parts have become."""
    sent = []
    for change in (0.0, 1.0):
        client = started(root, noise_multiplier=1.0, expected_batch=2).clients["ada"]
        for slot, tensor in client.train_state.tensors.items():
            if slot.role not in SHARED:
                tensor += change
        client.train(1, quiet)
        sent.append(client.send(1))
    assert same(*sent)


def test_the_shared_part_starts_from_the_download_however_little_is_adopted(root):
    run = started(root, noise_multiplier=0.0, expected_batch=2, clip=1e-30)  # steps do nothing
    client = run.clients["ada"]
    download = {}
    for slot, tensor in client.send(1).items():
        download[slot] = torch.full_like(tensor, 7.0)  # so bad that valid asks for none of it
    client.receive(download, 2)
    assert client.adopted_share == 0
    assert same(client.shared.tensors, download)


def test_who_has_no_use_for_noise_stays_as_it_would_be_by_itself(root):
    """Neither attention LoRA is taken nor is anything put beside the client's own."""
    client = started(root, noise_multiplier=1.0, expected_batch=2).clients["ada"]
    client.train(1, quiet)
    before = {slot: tensor.clone() for slot, tensor in client.train_state.tensors.items()}
    client.receive({slot: torch.full_like(t, 7.0) for slot, t in client.send(1).items()}, 2)
    assert client.adopted_share == 0 and same(client.train_state.tensors, before)
    closed = [tensor for slot, tensor in before.items() if slot.is_gate]
    assert closed and not any(map(torch.count_nonzero, closed))


@pytest.mark.parametrize("method", ["comigs", "fedavg"])
def test_only_who_adopts_has_a_copy_that_learns_without_noise(root, method):
    """The next download is written whole over fedavg's, which so is what everybody gets."""
    client = started(root, noise_multiplier=1.0, expected_batch=2, method=method).clients["ada"]
    own = client.train_state.tensors
    before = {slot: tensor.clone() for slot, tensor in own.items() if slot.role in SHARED}
    client.train(1, quiet)
    assert same({slot: own[slot] for slot in before}, before) == (method == "fedavg")


def test_a_document_counts_by_its_own_tokens_whoever_is_beside_it(root):
    """A mean over the batch's tokens would divide a document's gradient by its neighbours'."""
    run = started(root, noise_multiplier=1.0, expected_batch=2)
    client, windows = run.clients["ada"], windows_of(run.clients["ada"])
    tensors = {s: t for s, t in client.train_state.tensors.items() if s.role in SHARED}
    alone = [gradients_sum(run.attachment, tensors, [window], 1e30) for window in windows[:2]]
    beside = gradients_sum(run.attachment, tensors, windows[:2], 1e30)
    assert torch.allclose(alone[0] + alone[1], beside, rtol=1e-5, atol=1e-8)
    short = gradients_sum(run.attachment, tensors, [windows[0]], float(alone[0].norm()) / 4)
    assert math.isclose(float(short.norm()), float(alone[0].norm()) / 4, rel_tol=1e-5)


def test_windows_are_of_one_document_and_begin_anywhere_in_it(tmp_path):
    run = start_engine(run_config(tmp_path, "ada", data={"sequence_length": 12}))
    client, random = run.clients["ada"], np.random.default_rng(3)
    documents, (store,) = documents_of(client), client.data.train
    whole = np.split(np.asarray(store.tokens), np.flatnonzero(store.tokens == store.tokens[0]))[1:]
    assert len(documents) == len(whole) - 1 == store.num_documents
    starts = set()
    for _ in range(2000):
        window = documents.window(2, random)
        text = [*whole[2].tolist(), int(store.tokens[0])]
        seen = [*window.inputs[0].tolist(), int(window.targets[0, -1])]
        places = [n for n in range(len(text)) if text[n : n + 13] == seen]
        assert len(seen) == 13 and places
        assert window.inputs[0, 1:].tolist() == window.targets[0, :-1].tolist()
        starts |= set(places)
    assert {0, len(whole[2]) - 12} <= starts and len(starts) > 150


def test_a_chat_is_a_document(tmp_path):
    write_lines(tmp_path / "chats.jsonl", questions(40))
    config = run_config(
        tmp_path,
        "ada",
        {"ada": {"text": "chats.jsonl"}},
        base={"chat_template": PLAIN},
        data={"sequence_length": 40},
    )
    client = start_engine(config).clients["ada"]
    documents, (store,) = documents_of(client), client.data.train
    window = documents.window(1, np.random.default_rng(0))
    inputs, targets = store.example(1, 40)
    assert window.inputs[0].tolist() == inputs.tolist()
    assert window.targets[0].tolist() == targets.tolist() and window.num_learnt < len(targets)


def test_a_gradient_too_small_to_square_is_cut_all_the_same(root):
    """A server may send tensors by which gradients are tiny, and ask for a clip below them."""
    run = started(root, noise_multiplier=1.0, expected_batch=2)
    client, attachment = run.clients["ada"], run.attachment
    tiny = {}
    for slot, tensor in client.train_state.tensors.items():
        if slot.role in SHARED:
            tiny[slot] = tensor * 1e-23 if slot.matrix == "A" else torch.zeros_like(tensor)
    window = windows_of(client)[:1]
    whole = float(gradients_sum(attachment, tiny, window, 1e30).double().norm())
    cut = float(gradients_sum(attachment, tiny, window, whole / 1000).double().norm())
    assert 0 < whole < 1e-20 and cut == pytest.approx(whole / 1000, rel=1e-4)
