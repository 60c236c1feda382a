"""Windows: every token once to evaluate; uniform over stores and starts to train."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from comigs.data.batches import evaluation_windows, sample_windows
from comigs.seeds import generator
from tests.test_data_helper import build


@pytest.mark.parametrize("num_bytes", [1, 14, 15, 16, 17, 31, 32, 33, 100, 1000])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_every_token_once(tmp_path: Path, num_bytes: int, batch_size: int) -> None:
    rng = np.random.default_rng(num_bytes)
    stores = [
        build(tmp_path, ["".join(map(chr, rng.integers(97, 122, num_bytes)))]),
        build(tmp_path, ["other", "z" * num_bytes]),
    ]
    length = 16
    batches = list(evaluation_windows(stores, length, batch_size))
    for inputs, targets, _ in batches:
        assert (
            inputs.dtype == targets.dtype == np.int64
            and inputs.flags.c_contiguous
            and inputs.flags.writeable
        )
        assert inputs.shape == targets.shape and len(inputs) <= batch_size
        assert inputs.shape[1] == length or len(inputs) == 1
    everything = [np.asarray(s.tokens) for s in stores]
    assert (
        np.concatenate([t.ravel() for _, t, _ in batches]).tolist()
        == np.concatenate([e[1:] for e in everything]).tolist()
    )
    assert (
        np.concatenate([i.ravel() for i, _, _ in batches]).tolist()
        == np.concatenate([e[:-1] for e in everything]).tolist()
    )


def test_samples_are_windows_of_the_stream(tmp_path: Path) -> None:
    store = build(tmp_path, ["".join(chr(0x4E00 + i) for i in range(300))])
    stream = np.asarray(store.tokens).tolist()
    inputs, targets, _ = sample_windows([store], np.random.default_rng(0), 500, 8)
    assert inputs.shape == targets.shape == (500, 8) and inputs.dtype == targets.dtype == np.int64
    windows = {tuple(stream[i : i + 9]) for i in range(len(stream) - 8)}
    for row_in, row_out in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert (*row_in, row_out[-1]) in windows and row_in[1:] == row_out[:-1]


def test_every_start_is_drawn_and_the_shortest_store_has_one(tmp_path: Path) -> None:
    store = build(tmp_path, ["abcdef"])  # 8 tokens: SEP a b c d e f SEP
    inputs, targets, _ = sample_windows([store], np.random.default_rng(0), 300, 5)
    assert {row[0] for row in inputs.tolist()} == {256, ord("a"), ord("b")}
    assert 256 in targets[:, -1]  # the last token is a target
    inputs, _, _ = sample_windows([store], np.random.default_rng(0), 3, 7)
    assert len(np.unique(inputs, axis=0)) == 1


def test_mixture_is_uniform_over_stores_whatever_their_size(tmp_path: Path) -> None:
    stores = [
        build(tmp_path, [letter * size])
        for letter, size in (("a", 20), ("b", 200), ("c", 5000), ("d", 60))
    ]
    inputs, _, _ = sample_windows(stores, np.random.default_rng(1), 8000, 4)
    counts = [int((inputs == ord(letter)).any(axis=1).sum()) for letter in "abcd"]
    assert sum(counts) == 8000
    # chi-square with 3 degrees of freedom: above 16.3 once in 1000
    assert sum((c - 2000) ** 2 / 2000 for c in counts) < 16.3


def test_batches_depend_on_the_generator_only(tmp_path: Path) -> None:
    a, b = build(tmp_path, ["a first text " * 20]), build(tmp_path, ["another one " * 90])
    draw = lambda stores, *names: sample_windows(stores, generator(42, *names), 16, 12)  # noqa: E731
    one = draw([a, b], "batch", "fr", 1)
    list(evaluation_windows([a, b], 12, 4))
    np.random.default_rng(0).random()
    assert all(
        (x == y).all() for x, y in zip(one[:2], draw([a, b], "batch", "fr", 1)[:2], strict=True)
    )
    assert (one[0] != draw([a, b], "batch", "fr", 2)[0]).any()


def test_batches_are_copies(tmp_path: Path) -> None:
    store = build(tmp_path, ["some text that is long enough"])
    for inputs, targets, _ in [
        sample_windows([store], np.random.default_rng(0), 2, 4),
        *evaluation_windows([store], 4, 2),
    ]:
        assert type(inputs) is np.ndarray and not np.shares_memory(inputs, targets)
        assert not np.shares_memory(inputs, store.tokens)
