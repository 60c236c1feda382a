"""The commit point of a run (checkpoint.json), and the tensor files that it names."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from pydantic import NonNegativeInt
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from comigs.runs.metrics import Record

SUFFIX = ".safetensors"
PERSONAL = "personal"  # the one name that has no round: it is written once, at the end


class Checkpoint(Record):
    """A checkpoint says up to where a run is whole.

    round: the last whole round, 0 before the first. finished: the last download is in and test is
    measured. metrics_bytes, timings_bytes: lengths of metrics.jsonl and timings.jsonl up to here.
    files: sha256 of the newest tensor files and of metrics.jsonl up to here, by file in the run.
    """

    round: NonNegativeInt
    finished: bool
    metrics_bytes: NonNegativeInt
    timings_bytes: NonNegativeInt
    files: dict[str, str]

    @cached_property
    def newest(self) -> dict[str, str]:
        """The file in the run of every path: clients/fr/experts -> its newest file."""
        return {path_of(file): file for file in self.files if file.endswith(SUFFIX)}


def file_of(path: str, round: int) -> str:
    """Return the file of a path: clients/fr/experts -> .../round-0003.experts.safetensors."""
    parent, _, name = path.rpartition("/")
    if name != PERSONAL:
        name = f"round-{round:04d}.{name}"
    return f"{parent}/{name}{SUFFIX}"


def path_of(file: str) -> str:
    """Return the path of a file, which is its name without round and suffix."""
    parent, _, name = file.removesuffix(SUFFIX).rpartition("/")
    return f"{parent}/{re.sub(r'^round-[0-9]+[.]', '', name)}"


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; equal tensors give equal bytes. Raises OSError."""
    whole = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    try:
        # One key of metadata only: safetensors writes several in any order.
        save_file(whole, path, metadata={"comigs": "1"})
    except SafetensorError as error:
        # The operating system's errors are in there, as "... (os error 28)".
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error)) from None


def append(path: Path, raw: bytes) -> int:
    """Put bytes at the end of a file and on the disk, and return the file's length."""
    with path.open("ab") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def sha256(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
