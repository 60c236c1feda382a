"""This module holds the document: what is put into a split as a whole, and how it is compared."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

CHUNK = 1 << 18  # characters of a document worked on at once
PLAIN = "text"  # the shape of a document that is no chat
Turn = tuple[str, str]  # of a chat: the role (system, user or assistant) and what it says


@dataclass(frozen=True)
class Document:
    """A document is one text or one chat, the smallest thing that is in train, valid or test.

    text: all of it; of a chat, each turn's role and words, by which chats are counted and compared.
    name: where it comes from, for messages.
    key: what decides its split where splits are made by hash; None: its text. A source gives a key
        where documents keep a lasting name (a file's path), or where other sources hold the same
        document in another language. Of a chat it is else what is asked first.
    turns: of a chat, in order; none where the document is plain text.
    shape: how a chat was written down (a file of data/shapes).
    unread: the columns of its row that hold something and are no part of it.
    """

    text: str
    name: str
    key: str | None = None
    turns: tuple[Turn, ...] = ()
    shape: str = PLAIN
    unread: tuple[str, ...] = field(default=(), compare=False)

    @property
    def digest(self) -> bytes:
        """The sha256 (32 bytes) of exactly this text, or exactly these turns, in UTF-8."""
        return text_digest(json.dumps(self.turns, ensure_ascii=False) if self.turns else self.text)

    @cached_property
    def num_bytes(self) -> int:
        """The bytes of its text in UTF-8."""
        return sum(len(piece.encode()) for piece in chunks(self.text))

    @cached_property
    def content(self) -> bytes:
        """A digest by which documents are the same, as `content_digest`; chats also in capitals."""
        return content_digest(alike(self.text) if self.turns else self.text)

    @property
    def said(self) -> list[tuple[bytes, int]]:
        """What must not be in two places: its digest, and its bytes written as a document.

        Of a text it is the text, of a chat each answer with the question before it.
        """
        if not self.turns:
            return [(self.content, self.num_bytes)]
        found, asked = [], ""
        for role, words in self.turns:
            if role == "user":
                asked = words
            if role == "assistant":
                digest = content_digest(json.dumps([alike(asked), alike(words)]))
                size = len(_as_text([("user", asked), (role, words)]).encode())
                found.append((digest, size))
        return found


def chat(turns: tuple[Turn, ...], shape: str, name: str, key: str | None = None) -> Document:
    """Return a chat as a document. What is asked first decides its split where nothing else does.

    So one question is in one split, whatever its answers are.
    """
    asked = [words for role, words in turns if role == "user"]
    if key is None and asked:
        key = alike(asked[0])
    return Document(_as_text(turns), name, key, turns, shape)


def alike(words: str) -> str:
    """Return words as they are compared in chats: in small letters, with single spaces."""
    return " ".join(unicodedata.normalize("NFC", words).casefold().split())


def _as_text(turns: Iterable[Turn]) -> str:
    return "".join(f"{role}: {words}\n" for role, words in turns)


def chunks(text: str, size: int = CHUNK) -> Iterator[str]:
    """Yield the text in pieces of at most `size` characters.

    A cut is after a line, else before a space, else anywhere. It is before a space because most
    tokenizers glue a space to the word behind it.
    """
    start = 0
    while len(text) - start > size:
        end = text.rfind("\n", start, start + size) + 1
        if end <= start:
            end = text.rfind(" ", start + 1, start + size)
        if end <= start:
            end = start + size
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def text_digest(text: str) -> bytes:
    """Return the sha256 (32 bytes) of the exact text in UTF-8.

    Raises UnicodeEncodeError for half a surrogate pair.
    """
    digest = hashlib.sha256()
    for piece in chunks(text):
        digest.update(piece.encode())
    return digest.digest()


def content_digest(text: str) -> bytes:
    """Return 16 bytes that are equal for texts that differ only in white space."""
    digest = hashlib.sha256()
    for piece in chunks(text):
        digest.update(" ".join([*piece.split(), ""]).encode())
    return digest.digest()[:16]
