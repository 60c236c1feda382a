"""This module holds example stores: chats as tokens, with what of them is learnt.

An example is a chat as the model reads it, from its first token to its last. Beside a token store's
files there are marks.bin, which says of each token whether it is the assistant's and how many bytes
of text it stands for, and ends.bin, which says where each example ends.

A window holds whole examples one behind the other. Each is read for itself: positions begin anew
with it, and attention does not reach over its start.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comigs.data.corpus import (
    TokenStore,
    damaged,
    file_sha256,
    opening,
    read_meta,
    stored,
)

MARKS, ENDS = "marks.bin", "ends.bin"
LEARNT = 1 << 15  # of a mark: the token is the assistant's
BYTES = LEARNT - 1  # of a mark: the bytes of text that the token stands for
IGNORED = -100  # the target of a place where nothing is learnt


@dataclass(frozen=True, eq=False)
class ExampleStore(TokenStore):
    """An example store is one split of one client as chats.

    marks: (num_tokens,) uint16, memory-mapped. ends: (num_documents,) the number of tokens up to
    the end of each example. whole: every token is learnt and measured, not the assistant's alone.
    """

    marks: NDArray[np.uint16]
    ends: NDArray[np.int64]
    whole: bool
    _packed: dict[int, list[list[int]]] = field(default_factory=dict, repr=False)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Where each example begins."""
        return np.concatenate([np.zeros(1, np.int64), self.ends[:-1]])

    def num_places(self, length: int) -> tuple[int, int]:
        """Return how many windows of `length` there are, and 0: each is a place of its own."""
        return len(self.packed(length)), 0

    def streams(self, length: int) -> list[NDArray[Any]]:
        """Return each example as it is read in windows of `length` predictions."""
        bounds = zip(self.starts, self.ends, strict=True)
        return [self.tokens[start : min(start + length + 1, end)] for start, end in bounds]

    def measured_bytes(self, length: int) -> int:
        """Return the bytes of what is learnt of all examples, each up to `length` predictions."""
        return self._sum_over_examples(np.where(self._learnt, self.marks & BYTES, 0), length)

    def num_learnt(self, length: int) -> int:
        """Return how many tokens are learnt of all examples, each up to `length` predictions."""
        return self._sum_over_examples(self._learnt, length)

    def num_cut(self, length: int) -> int:
        """Return how many examples are longer than a window, and so lose their end."""
        return int((self.ends - self.starts - 1 > length).sum())

    def num_left_out(self, length: int) -> int:
        """Return how many examples have nothing to learn before a window's end."""
        return len(self.ends) - sum(map(len, self.packed(length)))

    def example(self, number: int, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return an example's inputs and targets, (places,) each, at most `length`."""
        start, end = int(self.starts[number]), int(self.ends[number])
        stop = min(start + 1 + length, end)
        targets = self.tokens[start + 1 : stop].astype(np.int64)
        targets[~self._learnt[start + 1 : stop]] = IGNORED
        return self.tokens[start : stop - 1].astype(np.int64), targets

    def packed(self, length: int) -> list[list[int]]:
        """Return for each window of `length` predictions the numbers of the examples in it.

        Every example with something to learn is in one window. In their order, each goes into the
        window with the least room that is enough (best fit).
        """
        if length not in self._packed:
            numbers = np.flatnonzero(self._sums(self._learnt, length))
            sizes = np.minimum(self.ends - self.starts - 1, length)[numbers]
            windows = best_fit(sizes.tolist(), length)
            self._packed[length] = [numbers[window].tolist() for window in windows]
        return self._packed[length]

    def verify(self) -> None:
        """Compare all files with their sha256. Raises UserError where one differs."""
        with opening(self.folder):
            for name, sha256 in read_meta(self.folder)["sha256"].items():
                if file_sha256(self.folder / name) != sha256:
                    raise damaged(self.folder)

    @cached_property
    def _learnt(self) -> NDArray[np.bool_]:
        """Which tokens are learnt."""
        return np.full(len(self.marks), True) if self.whole else (self.marks & LEARNT) > 0

    def _sums(self, values: NDArray[Any], length: int) -> NDArray[np.int64]:
        """Return for each example the sum of the values of what is predicted of it."""
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(values, dtype=np.int64)])
        stops = np.minimum(self.starts + 1 + length, self.ends)
        sums: NDArray[np.int64] = before[stops] - before[self.starts + 1]
        return sums

    def _sum_over_examples(self, values: NDArray[Any], length: int) -> int:
        return int(self._sums(values, length).sum())


def best_fit(sizes: list[int], room: int) -> list[list[int]]:
    """Return windows with room for `room`, each as the places in `sizes` of what is in it.

    In their order, each goes into the window with the least room that is enough.
    """
    # Windows are stacked by the room they have left; a bit says that a stack is not empty.
    windows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}
    rooms = 0
    for place, size in enumerate(sizes):
        enough = rooms >> size
        if enough:
            found = size + (enough & -enough).bit_length() - 1
            window = with_room[found].pop()
            if not with_room[found]:
                rooms &= ~(1 << found)
        else:
            found, window = room, len(windows)
            windows.append([])
        windows[window].append(place)
        left = found - size
        with_room.setdefault(left, []).append(window)
        rooms |= 1 << left
    return windows


def open_examples(folder: Path, whole: bool) -> ExampleStore:
    """Map a store that was built before, and return it. Raises UserError where it is damaged.

    whole: every token is learnt, not the assistant's alone.
    """
    with opening(folder):
        meta, held = read_meta(folder), stored(folder)
        marks: Any = np.memmap(folder / MARKS, dtype="<u2", mode="r")
        ends = np.fromfile(folder / ENDS, dtype="<i8")
        if len(marks) != len(held[1]) or len(ends) != held[3] or ends[-1] != len(marks):
            raise damaged(folder)
        # What is measured depends on the marks, the bounds and what is learnt, too.
        identity = "\n".join([*meta["sha256"].values(), "whole" if whole else "answers"])
        return ExampleStore(*held[:5], identity, marks, ends, whole)
