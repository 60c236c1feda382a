"""From a config to what clients train and are measured on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property

from comigs.config import SPLITS, Config, DataSection, Split
from comigs.data.corpus import Encoder, TokenStore, open_store, store_folder
from comigs.data.document import text_digest
from comigs.data.partition import Partition, check_disjoint, named, partition
from comigs.data.writer import StoreWriter
from comigs.errors import UserError

Progress = Callable[[str], None]
OFTEN = 100  # clients between two lines of progress


@dataclass(frozen=True)
class ClientData:
    """The stores of one client's splits: one each in-distribution, all clients' valid and test
    out-of-distribution.
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
    """What is known of a split before it is tokenised. text_sha256: of its texts, in order."""

    text_sha256: str
    num_bytes: int
    num_documents: int


@dataclass(frozen=True)
class Outline:
    """As ClientData, before anything is tokenised."""

    train: tuple[SplitText, ...]
    valid: tuple[SplitText, ...]
    test: tuple[SplitText, ...]


class Texts(Mapping[str, ClientData]):
    """Data of all clients by name, in the config's order. A client's text is tokenised when it is
    first looked at.

    In between only hashes of the documents are held: no text, no tokens, no open file. A look
    raises UserError for text that is too short, or was changed since.
    """

    def __init__(self, own: dict[str, _Own], distribution: str) -> None:
        self._own, self._mixed = own, distribution == "out"

    def __getitem__(self, name: str) -> ClientData:
        own = self._own[name]
        if not self._mixed:
            return _client_data(own.stores())
        return ClientData((own.stores()["train"],), *self._everybodys)

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)

    def outlines(self) -> dict[str, Outline]:
        """What each client's data is made of; tokenises nothing."""
        mixed = {
            s: tuple(own.texts[s] for own in self._own.values()) for s in SPLITS[1:] if self._mixed
        }
        return {
            n: Outline(*(mixed.get(s, (own.texts[s],)) for s in SPLITS))
            for n, own in self._own.items()
        }

    @cached_property
    def _everybodys(self) -> tuple[tuple[TokenStore, ...], tuple[TokenStore, ...]]:
        stores = [own.stores() for own in self._own.values()]
        return tuple(s["valid"] for s in stores), tuple(s["test"] for s in stores)


def prepare(config: Config, encoder: Encoder, progress: Progress | None = None) -> Texts:
    """Read all text once and look for leaks. Nothing is tokenised before it is looked at, or is in
    the cache already.

    progress: called with lines to show, then and later. Raises UserError for unusable text and for
    text in two places.
    """
    require_text(config)
    partitions = []
    for number, entry in enumerate(config.clients):
        if progress is not None and number and number % OFTEN == 0:
            progress(f"reading text: {number:,} of {len(config.clients):,} clients")
        partitions.append(partition(entry, config.data))
    check_disjoint(partitions)
    own = {part.client: _Own(part, config.data, encoder, progress) for part in partitions}
    return Texts(own, config.data.distribution)


def prepare_client(
    config: Config, name: str, encoder: Encoder, progress: Progress | None = None
) -> ClientData:
    """Data of one client, for a device that has no other client's text.

    Checks for leaks between the client's own splits only. Raises UserError as `prepare` does, and
    for data.distribution = "out", which needs everybody's text.
    """
    entry = config.client_named(name)
    require_own_text_only(config)
    part = partition(entry, config.data)
    check_disjoint([part])
    return _client_data(_Own(part, config.data, encoder, progress).stores())


def require_own_text_only(config: Config) -> None:
    """Raises UserError where a client needs the text of others."""
    if config.data.distribution == "out":
        raise UserError(
            'data.distribution: "out" mixes the text of all clients, and a device has only its own; use "in"'
        )


def require_text(config: Config) -> None:
    """Raises UserError where a client's text is not here."""
    for client in config.clients:
        if client.text is None:
            raise UserError(
                f"clients.{client.name}.text: missing; without --engine flower all text must be here. Give a path or "
                "SOURCE:ARGUMENT; `comigs list` shows the sources"
            )


class _Own:
    """One client's own text, and the way to its stores."""

    def __init__(
        self, part: Partition, data: DataSection, encoder: Encoder, progress: Progress | None
    ) -> None:
        self.part, self.data, self.encoder, self.progress = part, data, encoder, progress

    @cached_property
    def limits(self) -> dict[Split, int]:
        """Bytes of the splits of which only the first part is used; a last document is cut."""
        shares: dict[Split, float] = {
            "train": self.data.train_share,
            "valid": self.data.valid_share,
        }
        return {
            split: round(share * self.part.num_bytes(split))
            for split, share in shares.items()
            if share < 1
        }

    @cached_property
    def texts(self) -> dict[Split, SplitText]:
        """What each split holds; read again only where a part of it is used."""
        of, limits = self.part, self.limits
        whole = {
            s: SplitText(of.text_sha256(s), of.num_bytes(s), of.num_documents(s)) for s in SPLITS
        }
        return whole | {
            split: _measured(text for _, text in self._read([split])) for split in limits
        }

    def stores(self) -> dict[Split, TokenStore]:
        """The stores; missing ones are built together, in one pass over the text."""
        cache, name = self.data.cache, self.part.client
        folders = {
            split: store_folder(cache, text.text_sha256, self.encoder)
            for split, text in self.texts.items()
        }
        missing = [split for split in SPLITS if not folders[split].exists()]
        stores = {split: open_store(folders[split]) for split in SPLITS if split not in missing}
        with ExitStack() as stack, named(name):
            writers = {
                split: stack.enter_context(StoreWriter(folders[split], self.encoder))
                for split in missing
            }
            for split, text in self._read(missing):
                writers[split].add(text)
            for split, writer in writers.items():
                stores[split] = writer.commit(self.texts[split].text_sha256)
        for split in SPLITS:
            _check_length(stores[split], name, split, self.data.sequence_length)
        self._tell(stores, missing)
        return stores

    def _read(self, splits: Collection[Split]) -> Iterator[tuple[Split, str]]:
        """The texts of these splits, in one pass, up to their limits."""
        left = dict(self.limits)
        for split, document in self.part.read(splits):
            if split not in left:
                yield split, document.text
                continue
            raw = document.text.encode()
            if text := raw[: max(0, left[split])].decode(errors="ignore"):
                yield split, text
            left[split] -= len(raw)

    def _tell(self, stores: dict[Split, TokenStore], tokenised: Collection[Split]) -> None:
        """Lines of progress, the first time."""
        if self.progress is None:
            return
        name = self.part.client
        for split in SPLITS:
            store, how = stores[split], "tokenised" if split in tokenised else "in the cache"
            self.progress(
                f"{name}: {split}: {store.num_documents:,} documents, {store.num_bytes:,} bytes, "
                f"{store.num_tokens:,} tokens ({how})"
            )
        if self.part.num_repeated:
            self.progress(
                f"{name}: left out {self.part.num_repeated:,} documents that repeat an earlier one"
            )
        self.progress = None


def _client_data(stores: dict[Split, TokenStore]) -> ClientData:
    return ClientData(*((stores[split],) for split in SPLITS))


def _measured(texts: Iterator[str]) -> SplitText:
    digest, num_bytes, num_documents = hashlib.sha256(), 0, 0
    for text in texts:
        digest.update(text_digest(text))
        num_bytes, num_documents = num_bytes + len(text.encode()), num_documents + 1
    return SplitText(digest.hexdigest(), num_bytes, num_documents)


def _check_length(store: TokenStore, client: str, split: Split, length: int) -> None:
    """Train and valid are drawn from in whole windows; test is read to its end, however short."""
    needed = 2 if split == "test" else length + 1
    if store.num_tokens < needed:
        raise UserError(
            f'client "{client}": {split} has {store.num_tokens} tokens, but needs {needed} '
            f"(data.sequence_length + 1); give it more text or shorten the windows"
        )
