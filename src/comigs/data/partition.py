"""Documents to clients and splits, without leaks: no text is in two splits or at two clients.

One pass over a source keeps about 70 bytes per document and none of its text; tokenising is a
second pass, and only where the tokens are not there yet.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comigs.config import SPLITS, ClientEntry, DataSection, Split
from comigs.data.document import Document, chunks, content_digest, text_digest
from comigs.data.sources import open_source
from comigs.errors import UserError

MIN_DOCUMENTS = 3  # one for each split
REPEATED = len(SPLITS)  # the "split" of a document whose text came before


@dataclass(frozen=True)
class Listing:
    """What one pass over a source found, one entry per document.

    texts: sha256 of the exact text. contents: digest of the text, white space aside. sizes: bytes
    in UTF-8.
    splits: index into SPLITS, or REPEATED.
    """

    spec: str
    root: Path
    texts: NDArray[np.bytes_]
    contents: NDArray[np.bytes_]
    sizes: NDArray[np.int64]
    splits: NDArray[np.uint8]

    def read(self) -> Iterator[tuple[int, Document]]:
        """The source again, each document with its entry in `splits`; repeated ones are left
        out.
        """
        for number, document in enumerate(_documents(self.spec, self.root)):
            # a source that grew since the first pass: the store's check of its text will say so
            split = int(self.splits[number]) if number < len(self.splits) else 0
            if split != REPEATED:
                yield split, document


@dataclass(frozen=True)
class Partition:
    """The documents of one client by split."""

    client: str
    listings: tuple[Listing, ...]

    def read(self, splits: Collection[Split]) -> Iterator[tuple[Split, Document]]:
        """The documents of these splits, in one pass over each source that has any."""
        with named(self.client):
            for listing in self.listings:
                if any((listing.splits == SPLITS.index(split)).any() for split in splits):
                    for index, document in listing.read():
                        if SPLITS[index] in splits:
                            yield SPLITS[index], document

    def text_sha256(self, split: Split) -> str:
        """Hash of the split's texts, in order."""
        return hashlib.sha256(self._of(split, "texts").tobytes()).hexdigest()

    def contents(self, split: Split) -> NDArray[np.bytes_]:
        """(num_documents,) digests of the split's texts, white space aside."""
        return self._of(split, "contents")

    def num_bytes(self, split: Split) -> int:
        """Of the split's texts, in UTF-8."""
        return int(self._of(split, "sizes").sum())

    def num_documents(self, split: Split) -> int:
        """In the split."""
        return len(self._of(split, "sizes"))

    @property
    def num_repeated(self) -> int:
        """Documents left out because the same text came before in the same source."""
        return sum(int((listing.splits == REPEATED).sum()) for listing in self.listings)

    def _of(self, split: Split, field: str) -> NDArray[Any]:
        return np.concatenate(
            [getattr(li, field)[li.splits == SPLITS.index(split)] for li in self.listings]
        )


def partition(entry: ClientEntry, data: DataSection) -> Partition:
    """Read a client's text once and decide each document's split.

    Where splits are given, they are taken as they are. Else by hash: see `split_by_hash`.
    Raises UserError, naming the client, for text that cannot be read or is too little.
    """
    with named(entry.name):
        if isinstance(entry.text, str):
            return Partition(entry.name, (_list_by_hash(entry.text, data),))
        assert entry.text is not None, "require_text() refuses these"
        listings = []
        for index, split in enumerate(SPLITS):
            spec = getattr(entry.text, split)
            texts, contents, sizes, _ = _scan(spec, data.root)
            if not len(texts):
                raise UserError(f'text.{split} = "{spec}": there is no text in it')
            splits = np.where(_first_of_each(contents), index, REPEATED).astype(np.uint8)
            listings.append(Listing(spec, data.root, texts, contents, sizes, splits))
        return Partition(entry.name, tuple(listings))


def split_by_hash(
    shares: NDArray[np.float64], valid_fraction: float, test_fraction: float
) -> NDArray[np.uint8]:
    """(num_documents,) indices into SPLITS for documents with these shares (numbers in [0, 1) made
    from their keys).

    Below test_fraction is test, the next valid_fraction is valid, the rest train: a document's
    split depends on nothing but itself. Only where a split would be left empty does it get the
    nearest document.
    """
    num_test = int(np.clip((shares < test_fraction).sum(), 1, len(shares) - 2))
    num_held_out = int(
        np.clip((shares < test_fraction + valid_fraction).sum(), num_test + 1, len(shares) - 1)
    )
    order = np.argsort(shares, kind="stable")
    splits = np.full(len(shares), SPLITS.index("train"), dtype=np.uint8)
    splits[order[:num_held_out]] = SPLITS.index("valid")
    splits[order[:num_test]] = SPLITS.index("test")
    return splits


def share(document: Document) -> float:
    """A number in [0, 1) that depends only on the document's key, or its text where it has none."""
    digest = text_digest(document.text if document.key is None else document.key)
    return float(
        int.from_bytes(digest[:6]) / 2**48
    )  # 48 bits: exact in a float, and always below 1


def check_disjoint(partitions: Sequence[Partition]) -> None:
    """Raise UserError, naming both places, if a text is in two splits or at two clients."""
    places = [(part, split) for part in partitions for split in SPLITS]
    digests = [part.contents(split) for part, split in places]
    everything = np.concatenate(digests)
    owners = np.repeat(np.arange(len(places)), [len(d) for d in digests])
    order = np.argsort(everything, kind="stable")
    same = np.flatnonzero(everything[order][1:] == everything[order][:-1])
    if len(same):
        pair = order[same[0] : same[0] + 2]
        where = " and ".join(_where(places[owners[i]], bytes(everything[i])) for i in pair)
        more = f" (and {len(same) - 1} more such pairs)" if len(same) > 1 else ""
        raise UserError(
            f"the same text is in {where}{more}; a document may be in one split of one client: remove one"
        )


@contextmanager
def named(client: str) -> Iterator[None]:
    """Put the client's name in front of a UserError raised inside."""
    try:
        yield
    except UserError as error:
        raise UserError(f'client "{client}": {error}') from None


def _list_by_hash(spec: str, data: DataSection) -> Listing:
    texts, contents, sizes, shares = _scan(spec, data.root)
    first = _first_of_each(contents)
    if first.sum() < MIN_DOCUMENTS:
        raise UserError(
            f'text = "{spec}": {first.sum()} different documents, but splits by hash need {MIN_DOCUMENTS} or more; '
            "give more files, or text = {train = ..., valid = ..., test = ...}"
        )
    splits = np.full(len(texts), REPEATED, dtype=np.uint8)
    splits[first] = split_by_hash(shares[first], data.valid_fraction, data.test_fraction)
    return Listing(spec, data.root, texts, contents, sizes, splits)


def _scan(
    spec: str, root: Path
) -> tuple[NDArray[np.bytes_], NDArray[np.bytes_], NDArray[np.int64], NDArray[np.float64]]:
    """Digests of the texts, of their contents, their sizes, and the shares, of all documents of a
    source.
    """
    texts, contents, sizes, shares = bytearray(), bytearray(), array("q"), array("d")
    for document in _documents(spec, root):
        try:
            texts += text_digest(document.text)
            contents += content_digest(document.text)
            sizes.append(sum(len(piece.encode()) for piece in chunks(document.text)))
            shares.append(share(document))
        except UnicodeEncodeError:
            cure = "write it anew" if _is_unicode(document.name) else "rename it"
            raise UserError(
                f"{document.name!a}: not valid Unicode (half a surrogate pair); {cure}"
            ) from None
    return (
        np.frombuffer(texts, "S32"), np.frombuffer(contents, "S16"),
        np.frombuffer(sizes, np.int64), np.frombuffer(shares, np.float64),
    )  # fmt: skip


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _documents(spec: str, root: Path) -> Iterator[Document]:
    """The documents of a source that have any text."""
    return (
        document
        for document in open_source(spec, root)
        if document.text and not document.text.isspace()
    )


def _first_of_each(contents: NDArray[np.bytes_]) -> NDArray[np.bool_]:
    first = np.zeros(len(contents), dtype=bool)
    first[np.unique(contents, return_index=True)[1]] = True
    return first


def _where(place: tuple[Partition, Split], digest: bytes) -> str:
    """A place of a text in words; reads the source again to find the document's name.

    digest: as numpy hands it out, without zero bytes at its end.
    """
    part, split = place
    names = (
        d.name for _, d in part.read([split]) if content_digest(d.text).rstrip(b"\0") == digest
    )
    return f'client "{part.client}" {split} ("{next(names, "?")}")'
