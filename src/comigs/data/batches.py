"""Windows of tokens: random ones to train on, and every token once to evaluate on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comigs.data.corpus import TokenStore

Batch = tuple[NDArray[np.int64], NDArray[np.int64]]  # inputs and targets, both (windows, length)


def sample_windows(
    stores: Sequence[TokenStore], generator: np.random.Generator, num_windows: int, length: int
) -> Batch:
    """Random windows: for each, a store (all equally likely, whatever their size), then a start in
    it.

    Returns inputs and targets (num_windows, length); targets are the inputs' next tokens. What is
    drawn depends on `generator` only. Every store must have at least length + 1 tokens.
    """
    num_starts = np.array([store.num_tokens - length for store in stores])
    assert num_starts.min() > 0, "a store is shorter than one window; prepare() refuses these"
    chosen = generator.integers(len(stores), size=num_windows)
    starts = generator.integers(num_starts[chosen])
    windows = np.stack(
        [stores[s].tokens[i : i + length + 1] for s, i in zip(chosen, starts, strict=True)]
    )
    return _batch(windows[:, :-1]), _batch(windows[:, 1:])


def fold_windows(
    stores: Sequence[TokenStore], generator: np.random.Generator, num_windows: int, length: int, fold: int, folds: int,
    inside: bool,
) -> Batch:  # fmt: skip
    """Random windows that lie wholly inside, or wholly outside, part `fold` of `folds` of each
    store's tokens.

    The parts are equal stretches of the stream, so that a document is cut at most where two parts
    meet. Otherwise as `sample_windows`. Every part must have at least length + 1 tokens.
    """
    windows = []
    for chosen in generator.integers(len(stores), size=num_windows):
        tokens = stores[chosen].tokens
        first, end = (len(tokens) * f // folds for f in (fold, fold + 1))
        before, after = (
            max(0, first - length),
            max(0, len(tokens) - end - length),
        )  # starts of windows on either side
        if inside:
            start = first + generator.integers(end - first - length)
        else:
            start = generator.integers(before + after)
            start = start if start < before else end + start - before
        windows.append(tokens[start : start + length + 1])
    stacked = np.stack(windows)
    return _batch(stacked[:, :-1]), _batch(stacked[:, 1:])


def evaluation_windows(
    stores: Sequence[TokenStore], length: int, batch_size: int
) -> Iterator[Batch]:
    """Windows that have every token of every store as a target once, but each store's first
    separator.

    Yields inputs and targets (up to batch_size, length), and each store's shorter last window on
    its own, (1, rest). Reads a batch at a time from disk.
    """
    for store in stores:
        num_full = store.num_predicted // length
        for first in range(0, num_full, batch_size):
            last = min(first + batch_size, num_full)
            stream = store.tokens[first * length : last * length + 1]
            yield _batch(stream[:-1].reshape(-1, length)), _batch(stream[1:].reshape(-1, length))
        rest = store.tokens[num_full * length :]
        if len(rest) > 1:
            yield _batch(rest[None, :-1]), _batch(rest[None, 1:])


def _batch(windows: NDArray[Any]) -> NDArray[np.int64]:
    """A copy in memory, as tensors need it."""
    return np.array(windows, dtype=np.int64, order="C", subok=False)
