"""This module leads from a config to what clients train and are measured on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from comigs.config import SPLITS, Config, DataSection, Split
from comigs.data.corpus import Encoder, TokenStore, open_store, store_folder
from comigs.data.document import text_digest
from comigs.data.leaks import check_disjoint, without_short_repeats
from comigs.data.partition import Partition, named, partition
from comigs.data.writer import StoreWriter
from comigs.errors import UserError

Progress = Callable[[str], None]
OFTEN = 100  # clients between two lines of progress


@dataclass(frozen=True)
class ClientData:
    """A client's data is the stores of its splits.

    In-distribution, each split is one store; out-of-distribution, valid and test are those of all
    clients.
    """

    train: tuple[TokenStore, ...]
    valid: tuple[TokenStore, ...]
    test: tuple[TokenStore, ...]


def pooled(everyone: Iterable[ClientData]) -> ClientData:
    """Return the text of several clients as one client's: split by split, all of their stores."""
    stores: dict[str, list[TokenStore]] = {split: [] for split in SPLITS}
    for data in everyone:
        for split in SPLITS:
            stores[split] += getattr(data, split)
    return ClientData(**{split: tuple(found) for split, found in stores.items()})


@dataclass(frozen=True)
class SplitText:
    """A split's text is what is known of it before it is tokenized.

    `text_sha256` is that of its texts, in order.
    """

    text_sha256: str
    num_bytes: int
    num_documents: int


@dataclass(frozen=True)
class Outline:
    """An outline is as ClientData, before anything is tokenized."""

    train: tuple[SplitText, ...]
    valid: tuple[SplitText, ...]
    test: tuple[SplitText, ...]


def prepare(config: Config, encoder: Encoder, progress: Progress | None = None) -> Texts:
    """Read all text once and look for leaks. Nothing is tokenized before it is loaded.

    `progress` is called with lines to show, then and later. Raises UserError for unusable text and
    for text in two places.
    """
    require_text(config)
    partitions = []
    for number, entry in enumerate(config.clients):
        if progress is not None and number and number % OFTEN == 0:
            progress(f"reading text: {number:,} of {len(config.clients):,} clients")
        partitions.append(partition(entry, config.data))
    partitions = without_short_repeats(partitions, config.data)
    check_disjoint(partitions)
    own = [ClientText(part, config.data, encoder, progress) for part in partitions]
    return Texts(own, config.data.distribution)


def prepare_client(
    config: Config, name: str, encoder: Encoder, progress: Progress | None = None
) -> ClientData:
    """Return the data of one client, for a device that has no other client's text.

    Only leaks between the client's own splits are looked for. Raises UserError as `prepare` does,
    and for data.distribution = "out", which needs everybody's text.
    """
    entry = config.client_named(name)
    require_own_text_only(config)
    (part,) = without_short_repeats([partition(entry, config.data)], config.data)
    check_disjoint([part])
    if progress is not None:
        for line in part.notes():
            progress(line)
    return Texts([ClientText(part, config.data, encoder, progress)], "in").load(name)


def require_own_text_only(config: Config) -> None:
    """Refuse a config in which a client needs the text of others. Raises UserError."""
    if config.data.distribution == "out":
        raise UserError(
            'data.distribution: "out" mixes the text of all clients, '
            'and a device has only its own; use "in"'
        )


def require_text(config: Config) -> None:
    """Refuse a config in which a client's text is not here. Raises UserError."""
    for client in config.clients:
        if client.text is None:
            raise UserError(
                f"clients.{client.name}.text: missing; without --engine flower all text must be "
                "here. Give a path or SOURCE:ARGUMENT; `comigs list` shows the sources"
            )


class Texts:
    """The texts of all clients, in the config's order. `names` are the clients' names.

    A client's text is tokenized when it is first loaded. In between only hashes of the documents
    are held: no text, no tokens, no open file.
    """

    def __init__(self, own: Iterable[ClientText], distribution: str) -> None:
        self._own = {text.part.client: text for text in own}
        self._mixed = distribution == "out"
        self.names = tuple(self._own)

    def notes(self) -> list[str]:
        """Return lines that say what is left out of the clients' texts, and what is cut."""
        return [line for text in self._own.values() for line in text.part.notes()]

    def load(self, name: str) -> ClientData:
        """Return a client's data, tokenizing what is not in the cache.

        Raises UserError for text that is too short, or was changed since it was read.
        """
        stores = self._own[name].stores()
        if self._mixed:
            return ClientData((stores["train"],), *self._held_out_of_all)
        return ClientData((stores["train"],), (stores["valid"],), (stores["test"],))

    def load_all(self) -> dict[str, ClientData]:
        """Return the data of all clients by name."""
        return {name: self.load(name) for name in self.names}

    def outlines(self) -> dict[str, Outline]:
        """Return by name what each client's data is made of; nothing is tokenized."""
        texts = {name: own.texts for name, own in self._own.items()}
        valid_of_all = tuple(text["valid"] for text in texts.values())
        test_of_all = tuple(text["test"] for text in texts.values())
        found = {}
        for name, text in texts.items():
            if self._mixed:
                found[name] = Outline((text["train"],), valid_of_all, test_of_all)
            else:
                found[name] = Outline((text["train"],), (text["valid"],), (text["test"],))
        return found

    @cached_property
    def _held_out_of_all(self) -> tuple[tuple[TokenStore, ...], tuple[TokenStore, ...]]:
        stores = [own.stores() for own in self._own.values()]
        return tuple(s["valid"] for s in stores), tuple(s["test"] for s in stores)


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
                found[split] = _measured(text for _, text in self._read([split]))
            else:
                sha256, size = part.text_sha256(split), part.num_bytes(split)
                found[split] = SplitText(sha256, size, part.num_documents(split))
        return found

    def stores(self) -> dict[Split, TokenStore]:
        """Return the store of each split; missing ones are built together, in one pass."""
        folders: dict[Split, Path] = {}
        for split in SPLITS:
            sha256 = self.texts[split].text_sha256
            folders[split] = store_folder(self.data.cache, sha256, self.encoder)
        missing = [split for split in SPLITS if not folders[split].exists()]
        stores = {split: open_store(folders[split]) for split in SPLITS if split not in missing}

        # The writers are all open at once, so that a source with several splits is read once. What
        # they have not committed is removed where anything fails.
        with ExitStack() as stack, named(self.part.client):
            writers = {}
            for split in missing:
                writers[split] = stack.enter_context(StoreWriter(folders[split], self.encoder))
            for split, text in self._read(missing):
                writers[split].add(text)
            for split, writer in writers.items():
                stores[split] = writer.commit(self.texts[split].text_sha256)
        for split in SPLITS:
            self._check_length(split, stores[split])
        self._tell(stores, missing)
        return stores

    def _read(self, splits: Collection[Split]) -> Iterator[tuple[Split, str]]:
        """Yield the texts of these splits, in one pass, up to their limits."""
        left = dict(self.limits)
        for split, document in self.part.read(splits):
            if split not in left:
                yield split, document.text
                continue
            raw = document.text.encode()
            if text := raw[: max(0, left[split])].decode(errors="ignore"):
                yield split, text
            left[split] -= len(raw)

    def _check_length(self, split: Split, store: TokenStore) -> None:
        """Refuse a split that is too short. Raises UserError.

        Train and valid are drawn from in whole windows; test is read to its end, however short.
        """
        needed = 2 if split == "test" else self.data.sequence_length + 1
        if store.num_tokens < needed:
            raise UserError(
                f'client "{self.part.client}": {split} has {store.num_tokens} tokens, '
                f"but needs {needed} (data.sequence_length + 1); "
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
        if self.part.num_repeated:
            repeated = f"{self.part.num_repeated:,} documents that repeat an earlier one"
            self.progress(f"{name}: left out {repeated}")
        self.progress = None


def _measured(texts: Iterator[str]) -> SplitText:
    digest, num_bytes, num_documents = hashlib.sha256(), 0, 0
    for text in texts:
        digest.update(text_digest(text))
        num_bytes, num_documents = num_bytes + len(text.encode()), num_documents + 1
    return SplitText(digest.hexdigest(), num_bytes, num_documents)
