"""This module keeps the uploads of a round on the disk, so that memory holds what the server makes
of them and not all of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from comigs.files import writing
from comigs.methods.method import Upload
from comigs.runs.checkpoint import write_tensors
from comigs.slots import Slot

MAX_OPEN = 128  # files at once, well below what a process may have


class UploadStore:
    """An upload store is a folder of uploads, one safetensors file each, made when it is needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.open = lru_cache(MAX_OPEN)(_open)
        self._added = 0

    def close(self) -> None:
        """Close what is open; whoever looks at an upload opens it again.

        A file that is removed while it is open takes its room on the disk all the same.
        """
        self.open.cache_clear()

    def add(self, client: str, tensors: Upload) -> StoredUpload:
        """Put an upload on the disk; return the same slots and values, read where they are looked
        at, until the store is cleared. Raises UserError where the disk refuses.
        """
        # A file does not keep the order of its tensors, so their names begin with it.
        self._added += 1
        path = self.folder / f"{client}.{self._added}.safetensors"
        numbered = {f"{n}/{slot}": tensor for n, (slot, tensor) in enumerate(tensors.items())}
        with writing(self.folder, "make room or allow writing, then go on with: comigs resume"):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_tensors(path, numbered)
        return self.read(path)

    def read(self, path: Path) -> StoredUpload:
        """Return what a store has written to that file, slots in the same order."""
        file = self.open(path)
        names = sorted(file.keys(), key=lambda name: int(name.partition("/")[0]))
        return StoredUpload(self, path, {Slot.parse(n.partition("/")[2]): n for n in names})

    def clear(self) -> None:
        """Remove all uploads."""
        self.open.cache_clear()
        shutil.rmtree(self.folder, ignore_errors=True)


class StoredUpload(Mapping[Slot, Tensor]):
    """A stored upload is in a file. Each look gives a tensor of its own, and leaves nothing in
    memory once that is gone.
    """

    def __init__(self, store: UploadStore, path: Path, names: dict[Slot, str]) -> None:
        self.path = path
        self._store, self._names = store, names

    def __getitem__(self, slot: Slot) -> Tensor:
        # cloned: a product of what is not aligned as torch aligns it may differ in the last bit
        tensor: Tensor = self._store.open(self.path).get_tensor(self._names[slot]).clone()
        return tensor

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _open(path: Path) -> Any:
    # Mapped pages would count as memory while the file is open.
    return safe_open(path, framework="pt", backend="pread")
