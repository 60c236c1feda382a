"""This module cuts token stores into windows: random ones to train on, all to evaluate on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comigs.data.corpus import TokenStore

Batch = tuple[NDArray[np.int64], NDArray[np.int64]]  # inputs and targets, both (windows, length)


def sample_windows(
    stores: Sequence[TokenStore], generator: np.random.Generator, num_windows: int, length: int
) -> Batch:
    """Draw random windows and return inputs and targets, each (num_windows, length).

    For each window, a store is drawn (all are equally likely, whatever their size), then a start
    in it. Targets are the inputs' next tokens. What is drawn depends on `generator` only. Every
    store must have at least length + 1 tokens.
    """
    num_starts = np.array([store.num_tokens - length for store in stores])
    assert num_starts.min() > 0, "a store is shorter than one window; prepare() refuses these"
    chosen = generator.integers(len(stores), size=num_windows)
    starts = generator.integers(num_starts[chosen])
    windows = [
        stores[store].tokens[start : start + length + 1]
        for store, start in zip(chosen, starts, strict=True)
    ]
    return _batch(np.stack(windows))


@dataclass(frozen=True)
class Fold:
    """A fold is part `number` of `folds` equal stretches of a store's tokens, counted from 0.

    A document is cut at most where two folds meet. `inside` says whether windows lie wholly inside
    the fold or wholly outside.
    """

    number: int
    folds: int
    inside: bool


def fold_windows(
    stores: Sequence[TokenStore],
    generator: np.random.Generator,
    num_windows: int,
    length: int,
    fold: Fold,
) -> Batch:
    """Draw random windows inside or outside a fold; otherwise as `sample_windows`.

    Every fold must have at least length + 1 tokens.
    """
    windows = []
    for chosen in generator.integers(len(stores), size=num_windows):
        tokens = stores[chosen].tokens
        first = len(tokens) * fold.number // fold.folds
        end = len(tokens) * (fold.number + 1) // fold.folds
        if fold.inside:
            start = first + generator.integers(end - first - length)
        else:
            # Windows start before the fold or after it, and all these starts are equally likely.
            before, after = max(0, first - length), max(0, len(tokens) - end - length)
            start = generator.integers(before + after)
            if start >= before:
                start = end + start - before
        windows.append(tokens[start : start + length + 1])
    return _batch(np.stack(windows))


def evaluation_windows(
    stores: Sequence[TokenStore], length: int, batch_size: int
) -> Iterator[Batch]:
    """Yield windows that have every token of every store as a target once.

    Each store's first separator is no target. Inputs and targets are up to (batch_size, length);
    each store's shorter last window comes on its own. A batch at a time is read from disk.
    """
    for store in stores:
        yield from stream_windows(store.tokens, length, batch_size)


def stream_windows(tokens: NDArray[Any], length: int, batch_size: int) -> Iterator[Batch]:
    """Yield windows that have every token of one stream but its first as a target once.

    Inputs and targets are up to (batch_size, length); the shorter last window comes on its own.
    """
    num_full = (len(tokens) - 1) // length
    for first in range(0, num_full, batch_size):
        last = min(first + batch_size, num_full)
        stream = tokens[first * length : last * length + 1]
        inputs, targets = stream[:-1].reshape(-1, length), stream[1:].reshape(-1, length)
        yield _in_memory(inputs), _in_memory(targets)
    remainder = tokens[num_full * length :]
    if len(remainder) > 1:
        yield _batch(remainder[None])


def _batch(windows: NDArray[Any]) -> Batch:
    """Return inputs and targets from windows that are one token longer."""
    return _in_memory(windows[:, :-1]), _in_memory(windows[:, 1:])


def _in_memory(windows: NDArray[Any]) -> NDArray[np.int64]:
    """Return a copy in memory, as tensors need it."""
    return np.array(windows, dtype=np.int64, order="C", subok=False)
