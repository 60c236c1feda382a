"""This module reads a source once, and keeps what decides splits and shows leaks; none of its text.

That is about 80 bytes a document, and 32 for each answer of a chat.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from comigs.data.document import PLAIN, Document, text_digest
from comigs.data.pieces import pieces
from comigs.data.shapes import mixed
from comigs.data.sources import left_out, open_source
from comigs.errors import UserError

BLANK = "documents without text"


class Said(NamedTuple):
    """What is said in documents, which must not be in two places: texts, or answers to questions.

    digests: of each. owners: the number of the document that it is in. sizes: bytes in UTF-8.
    """

    digests: NDArray[np.bytes_]
    owners: NDArray[np.int64]
    sizes: NDArray[np.int64]


class Scan(NamedTuple):
    """A scan is what one pass over a source found, with one entry per document.

    texts: sha256 of the exact text. contents: digest of the text, white space aside. sizes: bytes
    in UTF-8. shares: what decides the split by hash. said: what is compared with other documents.
    shape: of every document; first: the first one's name. unread: columns of rows that are not
    read.
    """

    texts: NDArray[np.bytes_]
    contents: NDArray[np.bytes_]
    sizes: NDArray[np.int64]
    shares: NDArray[np.float64]
    said: Said
    shape: str = PLAIN
    first: str = ""
    unread: tuple[str, ...] = ()


def share(document: Document) -> float:
    """Return a number in [0, 1) made from the document's key, or its text where it has none."""
    digest = document.digest if document.key is None else text_digest(document.key)
    # 48 bits are exact in a float, and so the number is always below 1.
    return float(int.from_bytes(digest[:6]) / 2**48)


def scan_source(spec: str, root: Path, in_pieces: bool = False) -> tuple[Scan, dict[str, int]]:
    """Read a source once; return what is in it, and how many of what was passed over.

    Raises UserError.
    """
    texts, contents, sizes, shares = bytearray(), bytearray(), array("q"), array("d")
    said, owners, said_sizes = bytearray(), array("q"), array("q")
    blank, shape, first = 0, "", ""
    unread: dict[str, None] = {}  # in the order in which they are met
    for document in documents(spec, root, in_pieces, blank=True):
        if not document.text or document.text.isspace():
            blank += 1
            continue
        if not shape:
            shape, first = document.shape, document.name
        if document.shape != shape:
            raise mixed(document.name, document.shape, first, shape)
        unread.update(dict.fromkeys(document.unread))
        try:
            texts += document.digest
            contents += document.content
            for digest, size in document.said:
                said += digest
                owners.append(len(sizes))
                said_sizes.append(size)
            sizes.append(document.num_bytes)
            shares.append(share(document))
        # Half a surrogate pair has no UTF-8. It is in the text, or in the name that is the key.
        except UnicodeEncodeError:
            broken_name = any("\ud800" <= character <= "\udfff" for character in document.name)
            cure = "rename it" if broken_name else "write it anew"
            raise UserError(
                f"{document.name!a}: not valid Unicode (half a surrogate pair); {cure}"
            ) from None
    passed = left_out(spec, root)
    if blank:
        passed[BLANK] = blank
    scan = Scan(
        np.frombuffer(texts, "S32"),
        np.frombuffer(contents, "S16"),
        np.frombuffer(sizes, np.int64),
        np.frombuffer(shares, np.float64),
        Said(
            np.frombuffer(said, "S16"),
            np.frombuffer(owners, np.int64),
            np.frombuffer(said_sizes, np.int64),
        ),
        shape or PLAIN,
        first,
        tuple(unread),
    )
    return scan, passed


def documents(
    spec: str, root: Path, in_pieces: bool = False, blank: bool = False
) -> Iterator[Document]:
    """Yield the documents of a source, in pieces if asked. blank: also those without any text."""
    for whole in open_source(spec, root):
        for document in pieces(whole) if in_pieces else (whole,):
            if blank or (document.text and not document.text.isspace()):
                yield document
