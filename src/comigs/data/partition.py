"""This module assigns documents to clients and splits, without leaks.

No text is in two splits or at two clients. One pass over a source keeps little of each document and
none of its text (scan.py); tokenizing is a second pass, and only where the tokens are not there
yet.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comigs.config import SPLITS, ClientEntry, DataSection, Split, Text
from comigs.data.document import PLAIN, Document
from comigs.data.scan import Scan, documents, scan_source
from comigs.data.shapes import mixed, unread_lines
from comigs.errors import UserError

MIN_DOCUMENTS = 3  # one for each split
REPEATED = len(SPLITS)  # the "split" of a document whose text came before
ELSEWHERE = (
    REPEATED + 1
)  # the "split" of a short text that is in another split, or at another client


@dataclass(frozen=True)
class Listing:
    """A listing is a source and the split of each of its documents.

    `splits` holds for each document an index into SPLITS, or REPEATED, or ELSEWHERE. in_pieces: the
    source is one document, and is cut. left_out: how many of what the source passes over.
    """

    spec: str
    root: Path
    scan: Scan
    splits: NDArray[np.uint8]
    in_pieces: bool = False
    left_out: Mapping[str, int] = field(default_factory=dict)

    def read(self) -> Iterator[tuple[int, Document]]:
        """Read the source again; yield each document that is not repeated, with its split."""
        for number, document in enumerate(documents(self.spec, self.root, self.in_pieces)):
            # A source that grew since the first pass: the store's check of its text will say so.
            split = int(self.splits[number]) if number < len(self.splits) else 0
            if split < REPEATED:
                yield split, document


@dataclass(frozen=True)
class Partition:
    """A partition is the documents of one client by split."""

    client: str
    listings: tuple[Listing, ...]

    def read(self, splits: Collection[Split]) -> Iterator[tuple[Split, Document]]:
        """Yield the documents of these splits, in one pass over each source that has any."""
        wanted = [SPLITS.index(split) for split in splits]
        with named(self.client):
            for listing in self.listings:
                if np.isin(listing.splits, wanted).any():
                    for index, document in listing.read():
                        if index in wanted:
                            yield SPLITS[index], document

    def text_sha256(self, split: Split) -> str:
        """Return the hash of the split's texts, in order."""
        return hashlib.sha256(self._of(split, "texts").tobytes()).hexdigest()

    def said(self, split: Split) -> NDArray[np.bytes_]:
        """Return digests of the split's texts, or of all answers to questions in its chats."""
        chosen = []
        for listing in self.listings:
            said = listing.scan.said
            is_in = listing.splits[said.owners] == SPLITS.index(split)
            chosen.append(said.digests[is_in])
        return np.concatenate(chosen)

    def num_bytes(self, split: Split) -> int:
        """Return the bytes of the split's texts in UTF-8."""
        return int(self._of(split, "sizes").sum())

    @property
    def is_chat(self) -> bool:
        """Whether the documents are chats; all of a client's have one shape."""
        return self.listings[0].scan.shape != PLAIN

    def num_documents(self, split: Split) -> int:
        """Return the number of documents in the split."""
        return len(self._of(split, "sizes"))

    @property
    def num_repeated(self) -> int:
        """How many documents are left out, as their text came before in the same source."""
        return sum(int((listing.splits == REPEATED).sum()) for listing in self.listings)

    def notes(self) -> list[str]:
        """Return lines that say what is left out, and what is cut."""
        lines = []
        for listing in self.listings:
            if listing.in_pieces:
                number = len(listing.splits)
                lines.append(f'"{listing.spec}" is one document; cut at paragraphs into {number:,}')
            if listing.left_out:
                counts = [f"{number:,} {what}" for what, number in listing.left_out.items()]
                lines.append(f'left out of "{listing.spec}": {", ".join(counts)}')
            lines += unread_lines(listing.spec, listing.scan.shape, listing.scan.unread)
        if elsewhere := sum(int((part.splits == ELSEWHERE).sum()) for part in self.listings):
            lines.append(
                f"left out {elsewhere:,} short texts that another split or client has, too"
            )
        return [f"{self.client}: {line}" for line in lines]

    def _of(self, split: Split, field: str) -> NDArray[Any]:
        chosen = []
        for listing in self.listings:
            chosen.append(getattr(listing.scan, field)[listing.splits == SPLITS.index(split)])
        return np.concatenate(chosen)


def partition(entry: ClientEntry, data: DataSection) -> Partition:
    """Read a client's text once and decide each document's split.

    Where splits are given, they are taken as they are. Else by hash: see `split_by_hash`.
    Raises UserError, naming the client, for text that cannot be read or is too little.
    """
    assert entry.text is not None, "require_text() refuses these"
    with named(entry.name):
        return Partition(entry.name, list_text(entry.text, data))


def list_text(text: str | Text, data: DataSection) -> tuple[Listing, ...]:
    """Read a text once and decide each document's split. Raises UserError, without a name."""
    if isinstance(text, str):
        return (_list_by_hash(text, data),)
    listings: list[Listing] = []
    for index, split in enumerate(SPLITS):
        spec = getattr(text, split)
        scan, passed = scan_source(spec, data.root)
        if not len(scan.texts):
            raise UserError(f'text.{split} = "{spec}": there is no text in it')
        if listings and scan.shape != listings[0].scan.shape:
            other = listings[0].scan
            raise mixed(
                f'text.{split} = "{spec}": {scan.first}', scan.shape, other.first, other.shape
            )
        # A text that repeats an earlier one of its split would count twice.
        splits = np.where(_first_of_each(scan.contents), index, REPEATED).astype(np.uint8)
        listings.append(Listing(spec, data.root, scan, splits, left_out=passed))
    return tuple(listings)


def _list_by_hash(spec: str, data: DataSection) -> Listing:
    scan, passed = scan_source(spec, data.root)
    # A book in one file, or an export, is a document to nobody but its file system.
    in_pieces = len(scan.texts) == 1 and scan.shape == PLAIN
    if in_pieces:
        scan, _ = scan_source(spec, data.root, in_pieces)
    first = _first_of_each(scan.contents)
    number, what = len(np.unique(scan.shares[first])), "documents"
    if scan.shape != PLAIN:
        what = "questions"
    if number < MIN_DOCUMENTS:
        raise UserError(
            f'text = "{spec}": {number} different {what}, but splits by hash need '
            f"{MIN_DOCUMENTS} or more; "
            "give more files, or text = {train = ..., valid = ..., test = ...}"
        )
    splits = np.full(len(first), REPEATED, dtype=np.uint8)
    splits[first] = split_by_hash(scan.shares[first], data.valid_fraction, data.test_fraction)
    return Listing(spec, data.root, scan, splits, in_pieces, passed)


def split_by_hash(
    shares: NDArray[np.float64], valid_fraction: float, test_fraction: float
) -> NDArray[np.uint8]:
    """Return (num_documents,) indices into SPLITS for documents with these shares.

    A share is a number in [0, 1) made from a document's key. Below test_fraction is test, the next
    valid_fraction is valid, what is left is train: a document's split depends on nothing but
    its key. Only where a split would be left empty does it get the documents of the nearest key.
    """
    keys, key_of_each = np.unique(shares, return_inverse=True)
    num_test = int(np.clip((keys < test_fraction).sum(), 1, len(keys) - 2))
    below_train = (keys < test_fraction + valid_fraction).sum()
    num_held_out = int(np.clip(below_train, num_test + 1, len(keys) - 1))
    splits = np.full(len(keys), SPLITS.index("train"), dtype=np.uint8)
    splits[:num_held_out] = SPLITS.index("valid")
    splits[:num_test] = SPLITS.index("test")
    return splits[key_of_each]


def _first_of_each(contents: NDArray[np.bytes_]) -> NDArray[np.bool_]:
    first = np.zeros(len(contents), dtype=bool)
    first[np.unique(contents, return_index=True)[1]] = True
    return first


@contextmanager
def named(client: str) -> Iterator[None]:
    """Put the client's name in front of a UserError raised inside."""
    try:
        yield
    except UserError as error:
        raise UserError(f'client "{client}": {error}') from None
