"""This module draws windows by document: the unit of privacy, of which a step has one at most.

Elsewhere windows begin anywhere in a stream of documents, so that a document is in any number of
them (data/batches.py).
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from comigs.data.batches import Batch
from comigs.data.corpus import TokenStore
from comigs.data.examples import IGNORED, ExampleStore
from comigs.errors import UserError

BLOCK = 1 << 24  # tokens that are looked at at once


class Documents:
    """The documents of a store, each of which gives windows of at most `length` predictions."""

    def __init__(self, store: TokenStore, length: int) -> None:
        self.store, self.length = store, length

    def __len__(self) -> int:
        return self.store.num_documents

    def window(self, number: int, random: np.random.Generator) -> Batch | None:
        """Return one window of a document, as a batch of one, or None where nothing is learnt.

        Of a text that is longer than a window it begins anywhere, drawn anew at each call; of a
        chat it is the beginning, as everywhere. A text's first token is predicted from the
        separator before it, and the separator behind it is predicted last.
        """
        if isinstance(self.store, ExampleStore):
            inputs, targets = self.store.example(number, self.length)
            if not (targets != IGNORED).any():
                return None
            return Batch(inputs[None], targets[None], np.arange(len(inputs))[None])
        start, end = int(self._bounds[number]), int(self._bounds[number + 1])
        if (more := end - start - self.length) > 0:
            start += int(random.integers(more + 1))
            end = start + self.length
        tokens = self.store.tokens[start : end + 1].astype(np.int64)
        return Batch(tokens[None, :-1], tokens[None, 1:])

    @cached_property
    def _bounds(self) -> NDArray[np.int64]:
        """Where each document's separator is, and the one at the end."""
        tokens = self.store.tokens
        found = []
        for first in range(0, len(tokens), BLOCK):
            found.append(first + np.flatnonzero(tokens[first : first + BLOCK] == tokens[0]))
        bounds = np.concatenate(found)
        # A separator inside a document would make two units of one.
        if len(bounds) != len(self) + 1:
            raise UserError(
                f"{self.store.folder}: {len(self):,} documents, but {len(bounds):,} separators; "
                "delete the folder and run again"
            )
        return bounds
