"""This module holds token stores: documents as one stream of token ids in a file.

A store is mapped into memory, never read whole. The stream is SEP doc1 SEP doc2 SEP ... docN SEP.
Every token but the first is predicted once, and each document is predicted from its own separator
on. A store is a folder `<cache>/<key>/` with tokens.bin and meta.json; the key is a hash of the
text and the tokenizer, so a store is never out of date, only unused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from comigs.errors import UserError

FORMAT = 1  # of the folder; part of the key
TOKENS, META = "tokens.bin", "meta.json"
CHECKED = 1 << 16  # bytes at each end of the token file that are checked whenever it is opened


Tokens = tuple[list[int], list[bool], list[int]]
"""The tokens of a chat as the model reads it: ids; whether each is the assistant's; and the bytes
of text that each stands for, in UTF-8, which is none for a token that writes no text.
"""


class ChatEncoder(Protocol):
    """A chat encoder is a tokenizer with a chat template, as far as data needs to know them."""

    @property
    def id(self) -> str:
        """A hash of what decides the tokens of a chat beside the tokenizer."""

    @property
    def vocabulary_size(self) -> int:
        """A number above all ids."""

    def encode(self, turns: Sequence[tuple[str, str]], where: str) -> Tokens:
        """Return a chat's tokens. Raises UserError, naming the place, where there cannot be any."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return ids as text, with the template's own tokens."""


class Encoder(Protocol):
    """An encoder is a tokenizer, as far as data needs to know it."""

    @property
    def chats(self) -> ChatEncoder:
        """What chats are encoded with."""

    @property
    def id(self) -> str:
        """A hash of everything that decides the encoding: equal ids encode alike."""

    @property
    def vocabulary_size(self) -> int:
        """A number above all ids."""

    @property
    def separator(self) -> int:
        """The id put before each document and at the end."""

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, with no special token added."""


@dataclass(frozen=True)
class TokenStore:
    """A token store is one split of one client as tokens.

    tokens: (num_tokens,) read-only, memory-mapped; uint16, or uint32 for vocabularies above 65,536.
    num_bytes: of the text in UTF-8, for bits per byte. text_sha256: of the documents, in order.
    tokens_sha256: of tokens.bin.
    """

    folder: Path
    tokens: NDArray[Any]
    num_bytes: int
    num_documents: int
    text_sha256: str
    tokens_sha256: str

    @property
    def num_tokens(self) -> int:
        """The number of tokens in the stream, separators included."""
        return len(self.tokens)

    def num_places(self, length: int) -> tuple[int, int]:
        """Return how many places windows cover, and how many of these a window takes but one.

        A window of `length` predictions begins at any token that has as many behind it.
        """
        return len(self.tokens), length

    def num_learnt(self, length: int) -> int:
        """Return how many tokens are learnt in windows of `length`: of a text, all."""
        return len(self.tokens)

    def streams(self, length: int) -> list[NDArray[Any]]:
        """Return what is read from its start to its end: the text, or each chat up to `length`."""
        return [self.tokens]

    def measured_bytes(self, length: int) -> int:
        """Return the bytes of the text that all windows of `length` together predict."""
        return self.num_bytes

    def verify(self) -> None:
        """Compare the whole token file with its sha256. Raises UserError where it differs."""
        if file_sha256(self.folder / TOKENS) != self.tokens_sha256:
            raise damaged(self.folder)


def store_folder(cache: Path, text_sha256: str, encoder: Encoder, is_chat: bool = False) -> Path:
    """Return where the store of this text and this tokenizer is, or will be."""
    made_from = f"{FORMAT}\n{encoder.id}\n{encoder.separator}\n{text_sha256}"
    if is_chat:
        made_from += f"\n{encoder.chats.id}"
    return cache / hashlib.sha256(made_from.encode()).hexdigest()[:32]


def holds_stores(cache: Path) -> bool:
    """Return whether there are token stores in a folder. Raises OSError."""
    return any(
        (folder / META).is_file() and (folder / TOKENS).is_file() for folder in cache.iterdir()
    )


def open_store(folder: Path) -> TokenStore:
    """Map a store that was built before, and return it.

    Sizes and both ends of the file are checked, not every byte (see `verify`). Raises UserError
    saying what to delete where the store is damaged.
    """
    with opening(folder):
        return TokenStore(*stored(folder))


def stored(folder: Path) -> tuple[Path, NDArray[Any], int, int, str, str]:
    """Return what a token store is made of, in its order. To be called inside `opening`.

    Raises UserError where a file is damaged, and what `opening` turns into one.
    """
    path, meta = folder / TOKENS, read_meta(folder)
    whole = path.stat().st_size == meta["num_tokens"] * np.dtype(meta["dtype"]).itemsize
    if not whole or ends_sha256(path) != meta["ends_sha256"]:
        raise damaged(folder)
    return (
        folder,
        np.memmap(path, dtype=meta["dtype"], mode="r"),
        meta["num_bytes"],
        meta["num_documents"],
        meta["text_sha256"],
        meta["tokens_sha256"],
    )


def read_meta(folder: Path) -> Any:
    """Return what is written about a store. To be called inside `opening`."""
    return json.loads((folder / META).read_bytes())


@contextmanager
def opening(folder: Path) -> Iterator[None]:
    """Turn what goes wrong while a store is opened into a UserError that says what to delete."""
    try:
        yield
    except PermissionError as error:
        raise UserError(f"{error.filename}: no permission to read this token store") from None
    # Whatever else is wrong, also what JSON is missing, has one cure.
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise damaged(folder) from None


def file_sha256(path: Path) -> str:
    """Return the sha256 of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def ends_sha256(path: Path) -> str:
    """Return the sha256 of the first and last bytes of a file; of all where it is small."""
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(CHECKED))
        file.seek(max(file.tell(), os.fstat(file.fileno()).st_size - CHECKED))
        digest.update(file.read(CHECKED))
    return digest.hexdigest()


def damaged(folder: Path) -> UserError:
    """Return the error of a store that is not as it was written."""
    return UserError(f"{folder}: this token store is damaged; delete the folder and run again")
