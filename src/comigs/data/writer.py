"""This module builds a token store, with a bounded part of the text in memory."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np

from comigs.data.corpus import META, TOKENS, Encoder, TokenStore, ends_sha256, open_store
from comigs.data.document import Document, chunks
from comigs.errors import UserError
from comigs.files import ABANDONED_AFTER, flush, writing

BATCH = 1 << 19  # characters handed to the tokenizer at once
ADVICE = "free or allow it, or choose another folder with data.cache"
UNFINISHED = ".building-"


class StoreWriter:
    """A store writer writes a store in a folder of its own, and moves the whole into place.

    The move is one rename: a kill at any moment leaves either the whole store or an unfinished
    folder that nobody opens, and of two processes building the same store one wins and both use it.
    """

    def __init__(self, folder: Path, encoder: Encoder) -> None:
        self._folder, self._encoder = folder, encoder
        self._dtype = np.dtype("<u2" if self.vocabulary_size <= 1 << 16 else "<u4")
        # Pieces of text that are not tokenized yet, and whether each starts a document.
        self._pending: list[tuple[str, bool]] = []
        self._pending_characters = 0
        self._num_tokens = self._num_bytes = self._num_documents = 0
        self._text, self._tokens = hashlib.sha256(), hashlib.sha256()
        with writing(folder.parent, ADVICE):
            folder.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(folder.parent)
            # Only this user may read the folder, as private text can be read back from tokens.
            self._unfinished = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=folder.parent))
            self._file = (self._unfinished / TOKENS).open("wb")

    @property
    def vocabulary_size(self) -> int:
        """A number above all ids that are written."""
        return self._encoder.vocabulary_size

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(self, *_: object) -> None:
        """Remove what is unfinished."""
        with suppress(OSError):  # closing writes what is buffered, which fails on a full disk
            self._file.close()
        shutil.rmtree(self._unfinished, ignore_errors=True)

    def add(self, document: Document) -> None:
        """Append one document."""
        self._text.update(document.digest)
        self._num_documents += 1
        starts_document = True
        for piece in chunks(document.text):
            self._num_bytes += len(piece.encode())
            self._pending.append((piece, starts_document))
            self._pending_characters += len(piece)
            starts_document = False
            if self._pending_characters >= BATCH:
                self._encode_pending()

    def commit(self, text_sha256: str) -> TokenStore:
        """Finish the file, move the store into place and open it.

        `text_sha256` is that of the text this store was to hold. Raises UserError where the text
        added differs from it.
        """
        if self._text.hexdigest() != text_sha256:
            raise UserError("the text changed while it was being read; run again")
        self._finish()
        with writing(self._folder.parent, ADVICE):
            self._file.flush()
            flush(self._file.fileno())  # so that a power cut cannot leave a store with holes
            self._file.close()
            self._write_meta(text_sha256)
            try:
                os.replace(self._unfinished, self._folder)
            except OSError as error:
                # Where another process was first, its store is as good.
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
        return self._open()

    def _open(self) -> TokenStore:
        """Return the store that was built."""
        return open_store(self._folder)

    def _finish(self) -> None:
        """Write what is not written yet."""
        self._encode_pending()
        with writing(self._folder.parent, ADVICE):
            self._write([self._encoder.separator])

    def _encode_pending(self) -> None:
        """Tokenize and write the pieces collected so far."""
        encoded = self._encoder.encode([piece for piece, _ in self._pending])
        with writing(self._folder.parent, ADVICE):
            for (_, starts_document), ids in zip(self._pending, encoded, strict=True):
                self._write([self._encoder.separator, *ids] if starts_document else ids)
        self._pending, self._pending_characters = [], 0

    def _write(self, ids: list[int]) -> None:
        raw = np.array(ids, dtype=self._dtype).tobytes()
        self._tokens.update(raw)
        self._file.write(raw)
        self._num_tokens += len(ids)

    def _meta(self, text_sha256: str) -> dict[str, Any]:
        """Return what is written about the store."""
        return {
            "encoder": self._encoder.id,
            "dtype": self._dtype.str,
            "num_tokens": self._num_tokens,
            "num_bytes": self._num_bytes,
            "num_documents": self._num_documents,
            "text_sha256": text_sha256,
            "tokens_sha256": self._tokens.hexdigest(),
            "ends_sha256": ends_sha256(self._unfinished / TOKENS),
        }

    def _write_meta(self, text_sha256: str) -> None:
        meta = self._meta(text_sha256)
        # Not write_text: the file must be on the disk before the folder gets its name.
        with (self._unfinished / META).open("w", encoding="utf-8") as file:
            json.dump(meta, file, indent=1)
            file.flush()
            flush(file.fileno())


def _remove_abandoned(cache: Path) -> None:
    """Remove what killed processes left, once it is too old to be still in the making."""
    for folder in cache.glob(f"{UNFINISHED}*"):
        files = [folder, *folder.glob("*")]
        try:
            newest = max(file.stat().st_mtime for file in files)
        except OSError:  # its owner just finished it
            continue
        if time.time() - newest > ABANDONED_AFTER:
            shutil.rmtree(folder, ignore_errors=True)
