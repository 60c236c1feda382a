"""This module cuts a text that is one document, as a book in a file, into many."""

from __future__ import annotations

import re
from collections.abc import Iterator

from comigs.data.document import Document

PARAGRAPHS = re.compile(r"\n[ \t\r]*\n\s*")
LINES = re.compile(r"\n\s*")
LONGEST = 2000  # characters from which on a piece is whole
PIECES = 30  # about as many are made of a text that is shorter than as many longest pieces
FEWEST = 3  # paragraphs; with fewer, lines are the parts


def pieces(document: Document) -> Iterator[Document]:
    """Yield a document in pieces that end where a paragraph ends; where a line does, if need be.

    A piece is as many paragraphs as make about 2,000 characters, fewer in a short text. Its text
    decides its split.
    """
    text = document.text
    ends = [match.end() for match in PARAGRAPHS.finditer(text)]
    if len(ends) < FEWEST - 1:
        ends = [match.end() for match in LINES.finditer(text)]
    size = min(LONGEST, len(text) / PIECES)
    start = number = 0
    for end in [*ends, len(text)]:
        if end - start >= size or end == len(text):
            number += 1
            yield Document(text[start:end], f"{document.name}, piece {number}")
            start = end
