"""This module cuts token stores into windows: random ones to train on, all to evaluate on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from comigs.data.corpus import TokenStore
from comigs.data.examples import IGNORED, ExampleStore


class Batch(NamedTuple):
    """A batch is windows: inputs and targets, both (windows, length).

    positions: (windows, length), of each token in its own example, where windows hold several
    examples; a target is then IGNORED where nothing is learnt. None: every window is one text from
    its start on, and every target is learnt.
    """

    inputs: NDArray[np.int64]
    targets: NDArray[np.int64]
    positions: NDArray[np.int64] | None = None

    @property
    def num_learnt(self) -> int:
        """The number of targets that are learnt or measured."""
        if self.positions is None:
            return self.targets.size
        return int((self.targets != IGNORED).sum())

    def pieces(self, size: int) -> list[Batch]:
        """Return the batch in pieces of so many windows; the last may have fewer."""
        found = []
        for start in range(0, len(self.inputs), size):
            rows, positions = slice(start, start + size), self.positions
            if positions is not None:
                positions = positions[rows]
            found.append(Batch(self.inputs[rows], self.targets[rows], positions))
        return found


def sample_windows(
    stores: Sequence[TokenStore], generator: np.random.Generator, num_windows: int, length: int
) -> Batch:
    """Draw random windows and return inputs and targets, each (num_windows, length).

    For each window, a store is drawn (all are equally likely, whatever their size), then a start
    in it. Targets are the inputs' next tokens. What is drawn depends on `generator` only. Every
    store must have at least length + 1 tokens.
    """
    places = np.array([store.num_places(length) for store in stores])
    num_starts = places[:, 0] - places[:, 1]
    assert num_starts.min() > 0, "a store is shorter than one window; prepare() refuses these"
    chosen = generator.integers(len(stores), size=num_windows)
    starts = generator.integers(num_starts[chosen])
    pairs = zip(chosen, starts, strict=True)
    return joined([_window(stores[store], int(start), length) for store, start in pairs])


@dataclass(frozen=True)
class Fold:
    """A fold is part `number` of `folds` equal stretches of a store's places, counted from 0.

    A text is cut at most where two folds meet, a chat nowhere. `inside` says whether windows lie
    wholly inside the fold or wholly outside.
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
        store = stores[chosen]
        places, more = store.num_places(length)
        first = places * fold.number // fold.folds
        end = places * (fold.number + 1) // fold.folds
        if fold.inside:
            start = first + generator.integers(end - first - more)
        else:
            # Windows start before the fold or after it, and all these starts are equally likely.
            before, after = max(0, first - more), max(0, places - end - more)
            start = generator.integers(before + after)
            if start >= before:
                start = end + start - before
        windows.append(_window(store, int(start), length))
    return joined(windows)


def evaluation_windows(
    stores: Sequence[TokenStore], length: int, batch_size: int
) -> Iterator[Batch]:
    """Yield windows that have every token of every store as a target once.

    Of a text, its first separator is no target; of a chat, its first token, what is not learnt and
    what is cut. Inputs and targets are up to (batch_size, length); each store's shorter last window
    comes on its own. A batch at a time is read from disk.
    """
    for store in stores:
        # Chats are packed into windows once and for all, text is cut into them.
        if not isinstance(store, ExampleStore):
            yield from stream_windows(store.tokens, length, batch_size)
            continue
        places, _ = store.num_places(length)
        for first in range(0, places, batch_size):
            numbers = range(first, min(first + batch_size, places))
            yield joined([_window(store, number, length) for number in numbers])


def stream_windows(tokens: NDArray[Any], length: int, batch_size: int) -> Iterator[Batch]:
    """Yield windows that have every token of one stream but its first as a target once.

    Inputs and targets are up to (batch_size, length); the shorter last window comes on its own.
    """
    num_full = (len(tokens) - 1) // length
    for first in range(0, num_full, batch_size):
        last = min(first + batch_size, num_full)
        stream = tokens[first * length : last * length + 1]
        inputs, targets = stream[:-1].reshape(-1, length), stream[1:].reshape(-1, length)
        yield Batch(_in_memory(inputs), _in_memory(targets))
    remainder = tokens[num_full * length :]
    if len(remainder) > 1:
        yield _shifted(remainder)


def single_examples(stores: Sequence[TokenStore], length: int) -> Iterator[Batch]:
    """Yield what `evaluation_windows` does, in windows of one text or one chat each, unpacked.

    Without positions, so that any model reads them: inputs and targets are (1, up to length), and a
    chat's targets are IGNORED where nothing is learnt.
    """
    for store in stores:
        if not isinstance(store, ExampleStore):
            yield from evaluation_windows([store], length, 1)
            continue
        for window in store.packed(length):
            for number in window:
                inputs, targets = store.example(number, length)
                yield Batch(inputs[None], targets[None])


def _window(store: TokenStore, place: int, length: int) -> Batch:
    """Return the window at a place of a store, as a batch of one."""
    if not isinstance(store, ExampleStore):
        return _shifted(store.tokens[place : place + length + 1])
    examples = [store.example(number, length) for number in store.packed(length)[place]]
    inputs, targets = (np.concatenate(parts) for parts in zip(*examples, strict=True))
    positions = np.concatenate([np.arange(len(own)) for own, _ in examples])
    return Batch(inputs[None], targets[None], positions[None])


def joined(windows: Sequence[Batch]) -> Batch:
    """Return windows of one as one batch, as long as the longest.

    What a shorter one lacks is filled with an example of which nothing is learnt.
    """
    # Plain text has windows of one length, and no positions.
    inputs = [window.inputs[0] for window in windows]
    targets = [window.targets[0] for window in windows]
    if all(window.positions is None for window in windows):
        return Batch(np.stack(inputs), np.stack(targets))
    # Beside chats, a window of text is an example like any other.
    longest, positions = max(map(len, inputs)), []
    for number, window in enumerate(windows):
        own = np.arange(len(inputs[number]))
        if window.positions is not None:
            own = window.positions[0]
        empty = longest - len(own)
        positions.append(np.concatenate([own, np.arange(empty)]))
        inputs[number] = np.pad(inputs[number], (0, empty))
        targets[number] = np.pad(targets[number], (0, empty), constant_values=IGNORED)
    return Batch(np.stack(inputs), np.stack(targets), np.stack(positions))


def _shifted(tokens: NDArray[Any]) -> Batch:
    """Return a window from tokens that are one more than it predicts."""
    return Batch(_in_memory(tokens[None, :-1]), _in_memory(tokens[None, 1:]))


def _in_memory(windows: NDArray[Any]) -> NDArray[np.int64]:
    """Return a copy in memory, as tensors need it."""
    return np.array(windows, dtype=np.int64, order="C", subok=False)
