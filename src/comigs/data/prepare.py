"""From a config to what clients train and are measured on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from comigs.config import SPLITS, Config, DataSection, Split
from comigs.data.corpus import Encoder, TokenStore, open_store, store_folder
from comigs.data.document import text_digest
from comigs.data.partition import Partition, check_disjoint, named, partition
from comigs.data.writer import StoreWriter
from comigs.errors import UserError

Progress = Callable[[str], None]


@dataclass(frozen=True)
class ClientData:
    """The stores of one client's splits: one each in-distribution, all clients' valid and test out-of-distribution."""

    train: tuple[TokenStore, ...]
    valid: tuple[TokenStore, ...]
    test: tuple[TokenStore, ...]


def prepare(config: Config, encoder: Encoder, progress: Progress | None = None) -> dict[str, ClientData]:
    """Data of all clients by name, in the config's order. Tokenises only what is not in the cache yet.

    progress: called with a line per split. Raises UserError for unusable text and for text in two places.
    """
    partitions = [partition(entry, config.data) for entry in config.clients]
    check_disjoint(partitions)
    own = {part.client: _stores(part, config.data, encoder, progress) for part in partitions}
    if config.data.distribution == "in":
        return {name: _client_data(stores) for name, stores in own.items()}
    valid, test = (tuple(stores[split] for stores in own.values()) for split in ("valid", "test"))
    return {name: ClientData((stores["train"],), valid, test) for name, stores in own.items()}


def prepare_client(config: Config, name: str, encoder: Encoder, progress: Progress | None = None) -> ClientData:
    """Data of one client, for a device that has no other client's text.

    Checks for leaks between the client's own splits only. Raises UserError as `prepare` does, and for
    data.distribution = "out", which needs everybody's text.
    """
    entry = config.client_named(name)
    if config.data.distribution == "out":
        raise UserError(
            'data.distribution: "out" mixes the text of all clients, and a device has only its own; use "in"'
        )
    part = partition(entry, config.data)
    check_disjoint([part])
    return _client_data(_stores(part, config.data, encoder, progress))


def _client_data(stores: dict[Split, TokenStore]) -> ClientData:
    return ClientData(*((stores[split],) for split in SPLITS))


def _stores(part: Partition, data: DataSection, encoder: Encoder, progress: Progress | None) -> dict[Split, TokenStore]:
    """The stores of one client; missing ones are built together, in one pass over its text."""
    folders = {split: store_folder(data.cache, part.text_sha256(split), encoder) for split in SPLITS}
    missing = [split for split in SPLITS if not folders[split].exists()]
    stores = {split: open_store(folders[split]) for split in SPLITS if split not in missing}
    with ExitStack() as stack, named(part.client):
        writers = {split: stack.enter_context(StoreWriter(folders[split], encoder)) for split in missing}
        for split, document in part.read(missing):
            writers[split].add(document.text)
        for split, writer in writers.items():
            stores[split] = writer.commit(part.text_sha256(split))
    shares: dict[Split, float] = {"train": data.train_share, "valid": data.valid_share, "test": 1.0}
    for split, share in shares.items():
        if share < 1:
            with named(part.client):
                stores[split] = _first_part(part, split, round(share * stores[split].num_bytes), data.cache, encoder)
    for split in SPLITS:
        _check_length(stores[split], part.client, split, data.sequence_length)
        if progress is not None:
            store, how = stores[split], "tokenised" if split in missing else "in the cache"
            progress(
                f"{part.client}: {split}: {store.num_documents:,} documents, {store.num_bytes:,} bytes, "
                f"{store.num_tokens:,} tokens ({how})"
            )
    if progress is not None and part.num_repeated:
        progress(f"{part.client}: left out {part.num_repeated:,} documents that repeat an earlier one")
    return stores


def _first_part(part: Partition, split: Split, num_bytes: int, cache: Path, encoder: Encoder) -> TokenStore:
    """A store of its own for the first `num_bytes` of a split's text; the last document is cut."""
    text_sha256 = hashlib.sha256(b"".join(text_digest(t) for t in _first_texts(part, split, num_bytes))).hexdigest()
    folder = store_folder(cache, text_sha256, encoder)
    if folder.exists():
        return open_store(folder)
    with StoreWriter(folder, encoder) as writer:
        for text in _first_texts(part, split, num_bytes):
            writer.add(text)
        return writer.commit(text_sha256)


def _first_texts(part: Partition, split: Split, num_bytes: int) -> Iterator[str]:
    left = num_bytes
    for _, document in part.read([split]):
        raw = document.text.encode()
        if text := raw[:left].decode(errors="ignore"):
            yield text
        left -= len(raw)
        if left <= 0:
            return


def _check_length(store: TokenStore, client: str, split: Split, length: int) -> None:
    """Train and valid are drawn from in whole windows; test is read to its end, however short."""
    needed = 2 if split == "test" else length + 1
    if store.num_tokens < needed:
        raise UserError(
            f'client "{client}": {split} has {store.num_tokens} tokens, but needs {needed} '
            f"(data.sequence_length + 1); give it more text or shorten the windows"
        )
