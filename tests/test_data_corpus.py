"""Token stores: what is in them, how little memory they take, and what a kill or a damage does."""

from __future__ import annotations

import errno
import json
import os
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from comigs.data import writer as writer_module
from comigs.data.corpus import open_store, store_folder
from comigs.data.document import Document, chunks, content_digest, text_digest
from comigs.data.writer import StoreWriter
from comigs.errors import UserError
from tests.test_data_helper import ByteEncoder, build, sha_of, stream_of, texts_in

TEXTS = ["Häuser am See\n", "x", "ça va ? oui " * 50, "日本語\n\n" * 7]


def test_stream_counts_and_mapping(tmp_path: Path) -> None:
    store = build(tmp_path, TEXTS)
    assert store.tokens.tolist() == stream_of(TEXTS)
    assert store.num_bytes == sum(len(t.encode()) for t in TEXTS)
    assert (store.num_documents, store.num_tokens) == (4, len(stream_of(TEXTS)))
    # a separator, a token per byte and one per document's end
    assert store.num_tokens == 1 + store.num_bytes + store.num_documents
    assert isinstance(store.tokens, np.memmap) and store.tokens.dtype == np.uint16
    with pytest.raises(ValueError, match="read-only"):
        store.tokens[0] = 1
    store.verify()


def test_wide_ids_for_large_vocabularies(tmp_path: Path) -> None:
    small, large = ByteEncoder("s", 1 << 16), ByteEncoder("l", (1 << 16) + 1)
    assert build(tmp_path, TEXTS, small).tokens.dtype == np.uint16
    assert build(tmp_path, TEXTS, large).tokens.dtype == np.uint32


def test_key_is_text_and_tokenizer() -> None:
    folders = {
        store_folder(Path("c"), sha_of(texts), ByteEncoder(id))
        for texts in (TEXTS, TEXTS[:-1], TEXTS[::-1], ["".join(TEXTS)])
        for id in ("a", "b")
    }
    assert len(folders) == 8


def test_reading_back_equals_building(tmp_path: Path) -> None:
    built = build(tmp_path, TEXTS)
    opened = open_store(built.folder)
    assert opened.tokens.tolist() == built.tokens.tolist()
    assert (opened.num_bytes, opened.text_sha256) == (built.num_bytes, sha_of(TEXTS))


def test_long_document_is_encoded_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "BATCH", 1 << 12)
    monkeypatch.setattr("comigs.data.document.chunks.__defaults__", (1 << 10,))
    text = "".join(random.Random(0).choice("ab \né") for _ in range(50_000)) + "x" * 5_000
    encoder = ByteEncoder()
    store = build(tmp_path, [text, "short"], encoder)
    assert store.tokens.tolist() == stream_of([text, "short"])
    assert encoder.longest < (1 << 12) + (1 << 10)


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_chunks_join_to_the_text(size: int) -> None:
    rng = random.Random(size)
    for _ in range(50):
        text = "".join(rng.choice("ab \n") for _ in range(rng.randrange(60)))
        pieces = list(chunks(text, size))
        assert "".join(pieces) == text and all(0 < len(p) <= size for p in pieces)
    assert list(chunks("one two\nthree four", 12)) == ["one two\n", "three four"]
    assert list(chunks("one two three", 9)) == ["one two", " three"]


def test_digests() -> None:
    assert content_digest("a  b\n") == content_digest("\ta b") != content_digest("ab")
    assert text_digest("a  b") != text_digest("a b")


def test_text_larger_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "BATCH", 1 << 15)
    num_documents, size = 200, 20_000  # 4 MB of text, 8 MB of tokens; as Python ints over 100 MB

    class Zeros(ByteEncoder):
        def encode(self, texts: list[str]) -> list[list[int]]:
            return [[0] * len(text) for text in texts]

    encoder = Zeros()
    sha = sha_of(f"{i:020d}" * (size // 20) for i in range(num_documents))
    tracemalloc.start()
    with StoreWriter(store_folder(tmp_path, sha, encoder), encoder) as writer:
        for i in range(num_documents):
            writer.add(Document(f"{i:020d}" * (size // 20), ""))
        store = writer.commit(sha)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert store.num_bytes == num_documents * size
    assert peak < store.num_bytes / 3


def test_killed_while_building(tmp_path: Path) -> None:
    """What a kill leaves is never opened; the next build is whole; old leftovers go, young ones may
    yet be built.
    """
    folder = store_folder(tmp_path, sha_of(TEXTS), ByteEncoder())
    killed = StoreWriter(folder, ByteEncoder())
    killed.add(Document(TEXTS[0], ""))
    killed._file.close()
    assert not folder.exists() and len(list(tmp_path.iterdir())) == 1
    store = build(tmp_path, TEXTS)
    assert texts_in(store) == TEXTS
    assert (
        os.name != "posix" or store.folder.stat().st_mode & 0o077 == 0
    )  # its owner's only, as the text is private
    assert killed._unfinished.exists()
    for path in (killed._unfinished / "tokens.bin", killed._unfinished):
        os.utime(path, (0, 0))
    build(tmp_path, TEXTS[:2])
    assert not killed._unfinished.exists()


def test_failing_inside_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError),
        StoreWriter(tmp_path / "cache" / "key", ByteEncoder()) as writer,
    ):
        writer.add(Document("text", ""))
        raise RuntimeError
    assert list((tmp_path / "cache").iterdir()) == []


def test_two_processes_at_once(tmp_path: Path) -> None:
    folder = store_folder(tmp_path, sha_of(TEXTS), ByteEncoder())
    with StoreWriter(folder, ByteEncoder()) as first, StoreWriter(folder, ByteEncoder()) as second:
        for text in TEXTS:
            first.add(Document(text, ""))
            second.add(Document(text, ""))
        assert (
            first.commit(sha_of(TEXTS)).tokens.tolist()
            == second.commit(sha_of(TEXTS)).tokens.tolist()
        )
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]


def test_text_that_changed_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="changed while"),
        StoreWriter(tmp_path / "k", ByteEncoder()) as writer,
    ):
        writer.add(Document("new text", ""))
        writer.commit(sha_of(["old text"]))
    assert list(tmp_path.iterdir()) == []


def test_damage_is_found(tmp_path: Path) -> None:
    store = build(tmp_path, TEXTS)
    path, meta = store.folder / "tokens.bin", store.folder / "meta.json"
    raw, described = path.read_bytes(), meta.read_text()

    def refused() -> None:
        with pytest.raises(UserError, match="damaged; delete the folder"):
            open_store(store.folder)

    for damaged in (
        raw[:-2],
        raw + b"xx",
        raw[:-1],
        b"",
        bytes([raw[0] ^ 1]) + raw[1:],
        raw[:-1] + b"x",
    ):
        path.write_bytes(damaged)
        refused()
    path.write_bytes(raw)
    for damaged_meta in (
        "",
        "{",
        "[]",
        "{}",
        json.dumps({**json.loads(described), "num_tokens": "x"}),
    ):
        meta.write_text(damaged_meta)
        refused()
    meta.write_text(described)
    open_store(store.folder)
    path.unlink()
    refused()


def test_damage_in_the_middle_is_found_by_verify(tmp_path: Path) -> None:
    store = build(tmp_path, ["x" * 200_000])
    with (store.folder / "tokens.bin").open("r+b") as file:
        file.seek(200_000)
        file.write(b"!!")
    opened = open_store(store.folder)
    with pytest.raises(UserError, match="damaged"):
        opened.verify()


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (errno.ENOSPC, "no space"),
        (errno.EACCES, "no permission"),
        (errno.EROFS, "no permission"),
        (errno.EIO, "cannot"),
    ],
)
def test_disk_errors_name_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, says: str
) -> None:
    def fail(fd: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(writer_module.os, "fsync", fail)
    with pytest.raises(UserError, match=f"{tmp_path}: {says}.*data.cache"):
        build(tmp_path, TEXTS)
    assert list(tmp_path.iterdir()) == []


def test_cache_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"data\.cache"):
        build(tmp_path / "file", TEXTS)
