"""This module leads from a config to what clients train and are measured on."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from comigs.config import SPLITS, Config, Split
from comigs.data.client_text import ClientText, Progress, SplitText, chat_lines
from comigs.data.corpus import META, Encoder, TokenStore
from comigs.data.document import Document
from comigs.data.leaks import check_disjoint, without_short_repeats
from comigs.data.partition import Partition, partition
from comigs.errors import UserError

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


def keep_only(cache: Path, data: ClientData) -> None:
    """Remove all token stores of a cache but those of this text, split as it is."""
    kept = {store.folder for split in SPLITS for store in getattr(data, split)}
    for meta in cache.glob(f"[!.]*/{META}"):
        if meta.parent not in kept:
            shutil.rmtree(meta.parent, ignore_errors=True)


def pooled(everyone: Iterable[ClientData]) -> ClientData:
    """Return the text of several clients as one client's: split by split, all of their stores."""
    stores: dict[str, list[TokenStore]] = {split: [] for split in SPLITS}
    for data in everyone:
        for split in SPLITS:
            stores[split] += getattr(data, split)
    return ClientData(**{split: tuple(found) for split, found in stores.items()})


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
    require_several_documents(config, partitions)
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
    require_several_documents(config, [part])
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


def require_several_documents(config: Config, partitions: Iterable[Partition]) -> None:
    """Refuse a train text that is one document where privacy is by document. Raises UserError."""
    if not config.privacy.by_document:
        return
    for part in partitions:
        for listing in part.listings:
            if listing.in_pieces or part.num_documents("train") == 1:
                raise UserError(
                    f'clients.{part.client}.text: "{listing.spec}" is one document, and '
                    'privacy.level "document" protects documents, of which a step has one window '
                    "each; make a file of each letter, page or record, or a .jsonl file with a "
                    'line {"text": ...} for each'
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

    `encoder` makes tokens of them.

    A client's text is tokenized when it is first loaded. In between only hashes of the documents
    are held: no text, no tokens, no open file.
    """

    def __init__(self, own: Iterable[ClientText], distribution: str) -> None:
        self._own = {text.part.client: text for text in own}
        self._mixed = distribution == "out"
        self.encoder = next(iter(self._own.values())).encoder
        self.names = tuple(self._own)

    @property
    def has_chats(self) -> bool:
        """Whether any client's documents are chats."""
        return any(text.part.is_chat for text in self._own.values())

    def chat_lines(self, name: str) -> list[str]:
        """Return lines on what is learnt of a client's own chats; none where it has plain text."""
        own = self._own[name]
        return chat_lines(name, own.stores(), own.data.sequence_length) if own.part.is_chat else []

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

    def documents(self, name: str, split: Split) -> Iterator[Document]:
        """Yield the documents that a client's split is made of, read from their sources again.

        Valid and test out-of-distribution are those of all clients.
        """
        held_out_of_all = self._mixed and split != "train"
        for own in self._own.values() if held_out_of_all else [self._own[name]]:
            yield from own.documents(split)

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
