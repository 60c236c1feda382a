"""What the data tests share: a tokenizer of bytes, and small ways to write text and read stores."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np

from comigs.config import Config, parse_config
from comigs.data.corpus import TokenStore, store_folder
from comigs.data.document import Document, text_digest
from comigs.data.writer import StoreWriter

SEPARATOR = 256


class ByteEncoder:
    """A token per UTF-8 byte, and one separator; counts how often it is called."""

    separator = SEPARATOR

    def __init__(self, id: str = "bytes", vocabulary_size: int = 257) -> None:
        self.id, self.vocabulary_size, self.num_calls = id, vocabulary_size, 0
        self.longest = 0  # characters in one call

    def encode(self, texts: list[str]) -> list[list[int]]:
        self.num_calls += 1
        self.longest = max(self.longest, sum(map(len, texts)))
        return [list(text.encode()) for text in texts]


def stream_of(texts: Iterable[str]) -> list[int]:
    """The stream a store of these texts must hold, written down without any of the code under
    test.
    """
    stream = [SEPARATOR]
    for text in texts:
        stream += [*text.encode(), SEPARATOR]
    return stream


def texts_in(store: TokenStore) -> list[str]:
    """The texts back from a store of bytes."""
    tokens = np.asarray(store.tokens)
    ends = np.flatnonzero(tokens == SEPARATOR)
    return [bytes(tokens[a + 1 : b].astype(np.uint8)).decode() for a, b in pairwise(ends)]


def sha_of(texts: Iterable[str]) -> str:
    return hashlib.sha256(b"".join(map(text_digest, texts))).hexdigest()


def build(cache: Path, texts: list[str], encoder: ByteEncoder | None = None) -> TokenStore:
    """A store of these texts."""
    encoder = encoder or ByteEncoder()
    with StoreWriter(store_folder(cache, sha_of(texts), encoder), encoder) as writer:
        for text in texts:
            writer.add(Document(text, ""))
        return writer.commit(sha_of(texts))


def write_notes(folder: Path, num_files: int, label: str, num_words: int = 30) -> None:
    """A folder of .txt files that all differ, between labels too."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(num_files):
        (folder / f"note{i:03d}.txt").write_text(
            f"{label} {i} " + f"word{i} é\n" * num_words, encoding="utf-8"
        )


def config_of(root: Path, clients: dict[str, object], **data: object) -> Config:
    """A config with these clients' texts."""
    return parse_config(
        {
            "data": {
                "root": str(root),
                "cache": str(root / "cache"),
                "sequence_length": 16,
                **data,
            },
            "clients": [{"name": name, "text": text} for name, text in clients.items()],
        }
    )


def test_the_helper_agrees_with_itself(tmp_path: Path) -> None:
    texts = ["häuser\n", "b", "ça va"]
    assert texts_in(build(tmp_path, texts)) == texts
