"""This module builds an example store, a chat at a time."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from comigs.data.corpus import TOKENS, Encoder, file_sha256
from comigs.data.document import Document
from comigs.data.examples import BYTES, ENDS, LEARNT, MARKS, ExampleStore, open_examples
from comigs.data.writer import ADVICE, StoreWriter
from comigs.files import flush, writing


class ExampleWriter(StoreWriter):
    """An example writer writes a store of chats; otherwise as a store writer.

    whole: the store that is opened learns every token, not the assistant's alone.
    """

    def __init__(self, folder: Path, encoder: Encoder, whole: bool) -> None:
        super().__init__(folder, encoder)
        self._whole = whole
        with writing(folder.parent, ADVICE):
            self._others = {name: (self._unfinished / name).open("wb") for name in (MARKS, ENDS)}

    def __exit__(self, *error: object) -> None:
        """Remove what is unfinished."""
        for file in self._others.values():
            with suppress(OSError):  # closing writes what is buffered, which fails on a full disk
                file.close()
        super().__exit__(*error)

    @property
    def vocabulary_size(self) -> int:
        """A number above all ids, those of the chat template's own tokens among them."""
        return self._encoder.chats.vocabulary_size

    def add(self, document: Document) -> None:
        """Append one chat. Raises UserError, naming it, where it has no tokens."""
        ids, learnt, num_bytes = self._encoder.chats.encode(document.turns, document.name)
        self._text.update(document.digest)
        self._num_documents += 1
        self._num_bytes += len(document.text.encode())
        # A token of more bytes than a mark counts is not known of any tokenizer.
        marks = np.minimum(num_bytes, BYTES) | np.where(learnt, LEARNT, 0)
        with writing(self._folder.parent, ADVICE):
            self._write(ids)
            self._others[MARKS].write(marks.astype("<u2").tobytes())
            self._others[ENDS].write(np.array(self._num_tokens, dtype="<i8").tobytes())

    def _finish(self) -> None:
        """Put the marks and the bounds on the disk."""
        with writing(self._folder.parent, ADVICE):
            for file in self._others.values():
                file.flush()
                flush(file.fileno())
                file.close()

    def _meta(self, text_sha256: str) -> dict[str, Any]:
        """Return what is written about the store, with the sha256 of each of its files."""
        others = {name: file_sha256(self._unfinished / name) for name in (MARKS, ENDS)}
        meta = super()._meta(text_sha256)
        sha256 = {TOKENS: meta["tokens_sha256"], **others}
        return meta | {"chats": self._encoder.chats.id, "sha256": sha256}

    def _open(self) -> ExampleStore:
        return open_examples(self._folder, self._whole)
