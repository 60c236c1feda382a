"""This module leads from one client's own text, or its chats, to the token stores of its splits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from comigs.config import SPLITS, DataSection, Split
from comigs.data.corpus import Encoder, TokenStore, open_store, store_folder
from comigs.data.document import Document
from comigs.data.example_writer import ExampleWriter
from comigs.data.examples import ExampleStore, open_examples
from comigs.data.partition import Partition, named
from comigs.data.writer import StoreWriter
from comigs.errors import UserError

Progress = Callable[[str], None]


@dataclass(frozen=True)
class SplitText:
    """A split's text is what is known of it before it is tokenized.

    `text_sha256` is that of its texts, in order.
    """

    text_sha256: str
    num_bytes: int
    num_documents: int


class ClientText:
    """A client's own text leads to its stores."""

    def __init__(
        self, part: Partition, data: DataSection, encoder: Encoder, progress: Progress | None
    ) -> None:
        self.part, self.data, self.encoder, self.progress = part, data, encoder, progress

    @cached_property
    def limits(self) -> dict[Split, int]:
        """The bytes of the splits of which only the first part is used; a last document is cut."""
        limits: dict[Split, int] = {}
        if self.data.train_share < 1:
            limits["train"] = round(self.data.train_share * self.part.num_bytes("train"))
        if self.data.valid_share < 1:
            limits["valid"] = round(self.data.valid_share * self.part.num_bytes("valid"))
        return limits

    @cached_property
    def texts(self) -> dict[Split, SplitText]:
        """What each split holds; text is read again only where a part of it is used."""
        found, part = {}, self.part
        for split in SPLITS:
            if split in self.limits:
                found[split] = _measured(document for _, document in self._read([split]))
            else:
                sha256, size = part.text_sha256(split), part.num_bytes(split)
                found[split] = SplitText(sha256, size, part.num_documents(split))
        return found

    def stores(self) -> dict[Split, TokenStore]:
        """Return the store of each split; missing ones are built together, in one pass."""
        folders: dict[Split, Path] = {}
        for split in SPLITS:
            sha256 = self.texts[split].text_sha256
            folders[split] = store_folder(self.data.cache, sha256, self.encoder, self.part.is_chat)
        missing = [split for split in SPLITS if not folders[split].exists()]
        stores = {split: self._open(folders[split]) for split in SPLITS if split not in missing}

        # The writers are all open at once, so that a source with several splits is read once. What
        # they have not committed is removed where anything fails.
        with ExitStack() as stack, named(self.part.client):
            writers = {}
            for split in missing:
                writers[split] = stack.enter_context(self._writer(folders[split]))
            for split, document in self._read(missing):
                writers[split].add(document)
            for split, writer in writers.items():
                stores[split] = writer.commit(self.texts[split].text_sha256)
        # In the order of splits, whichever of them were there already: so they are told.
        stores = {split: stores[split] for split in SPLITS}
        for split, store in stores.items():
            self._check_length(split, store)
        self._tell(stores, missing)
        return stores

    def documents(self, split: Split) -> Iterator[Document]:
        """Yield the documents of a split, read from their source again."""
        for _, document in self._read([split]):
            yield document

    def _open(self, folder: Path) -> TokenStore:
        if self.part.is_chat:
            return open_examples(folder, self.data.loss == "all")
        return open_store(folder)

    def _writer(self, folder: Path) -> StoreWriter:
        if self.part.is_chat:
            return ExampleWriter(folder, self.encoder, self.data.loss == "all")
        return StoreWriter(folder, self.encoder)

    def _read(self, splits: Collection[Split]) -> Iterator[tuple[Split, Document]]:
        """Yield the documents of these splits, in one pass, up to their limits.

        A text is cut there. A chat is not: the last one is the last that is whole, or the first.
        """
        left, begun = dict(self.limits), set[Split]()
        for split, document in self.part.read(splits):
            if split not in left:
                yield split, document
                continue
            raw = document.text.encode()
            if document.turns:
                if split not in begun or len(raw) <= left[split]:
                    yield split, document
            elif text := raw[: max(0, left[split])].decode(errors="ignore"):
                yield split, replace(document, text=text)
            begun.add(split)
            left[split] -= len(raw)

    def _check_length(self, split: Split, store: TokenStore) -> None:
        """Refuse a split that is too short. Raises UserError.

        Train and valid are drawn from in whole windows; test is read to its end, however short.
        """
        length = self.data.sequence_length
        if isinstance(store, ExampleStore):
            if not store.packed(length):
                raise UserError(
                    f'client "{self.part.client}": {split} has no chat whose answer begins within '
                    f"data.sequence_length ({length} tokens); make it longer"
                )
            return
        if split != "test" and store.num_tokens < length + 1:
            raise UserError(
                f'client "{self.part.client}": {split} has {store.num_tokens} tokens, '
                f"but needs {length + 1} (data.sequence_length + 1); "
                "give it more text or shorten the windows"
            )

    def _tell(self, stores: dict[Split, TokenStore], tokenized: Collection[Split]) -> None:
        """Send lines of progress, the first time."""
        if self.progress is None:
            return
        name = self.part.client
        for split in SPLITS:
            store, how = stores[split], "tokenised" if split in tokenized else "in the cache"
            self.progress(
                f"{name}: {split}: {store.num_documents:,} documents, {store.num_bytes:,} bytes, "
                f"{store.num_tokens:,} tokens ({how})"
            )
        for line in chat_lines(name, stores, self.data.sequence_length):
            self.progress(line)
        if self.part.num_repeated:
            repeated = f"{self.part.num_repeated:,} documents that repeat an earlier one"
            self.progress(f"{name}: left out {repeated}")
        self.progress = None


def chat_lines(client: str, stores: Mapping[Split, TokenStore], length: int) -> list[str]:
    """Return lines on what is learnt of a client's chats, and what of them windows do not hold."""
    learnt, cut, lost = [], [], []
    for split, store in stores.items():
        if not isinstance(store, ExampleStore):
            return []
        learnt.append(f"{split} {store.num_learnt(length):,}")
        chats = f"of {store.num_documents:,}"
        if number := store.num_cut(length):
            cut.append(f"{split} {number:,} {chats}")
        if number := store.num_left_out(length):
            lost.append(f"{split} {number:,} {chats}")

    # What people asked for is said first, then what a longer window would change.
    window = f"data.sequence_length ({length} tokens)"
    lines = [f"learnt or measured: {', '.join(learnt)} tokens"]
    if cut:
        lines.append(f"chats longer than {window}, cut at their end: {', '.join(cut)}")
    if lost:
        lines.append(f"chats without an answer within {window}, left out: {', '.join(lost)}")
    return [f"{client}: {line}" for line in lines]


def _measured(documents: Iterator[Document]) -> SplitText:
    digest, num_bytes, num_documents = hashlib.sha256(), 0, 0
    for document in documents:
        digest.update(document.digest)
        num_bytes += len(document.text.encode())
        num_documents += 1
    return SplitText(digest.hexdigest(), num_bytes, num_documents)
