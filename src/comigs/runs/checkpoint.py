"""The commit point of a run (checkpoint.json), and the tensor files that it names."""

from __future__ import annotations

import errno
import hashlib
import re
from collections.abc import Mapping
from functools import cached_property
from io import BufferedReader
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt, ValidationError, field_validator
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from comigs.errors import UserError
from comigs.runs.layout import METRICS, PERSONAL, SUFFIX, is_tensor_file
from comigs.runs.record import Record

RESTORE = "restore it from a copy or start a new run"


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

    @field_validator("files")
    @classmethod
    def _names_of_a_run(cls, files: dict[str, str]) -> dict[str, str]:
        for name in files:
            if name != METRICS and not is_tensor_file(name):
                raise ValueError(f'files: "{name}" is no name of a file of a run')
        return files

    @cached_property
    def newest(self) -> dict[str, str]:
        """The file in the run of every path: clients/fr/experts -> its newest file."""
        return {path_of(file): file for file in self.files if file.endswith(SUFFIX)}


def read_checkpoint(values: Mapping[str, Any], path: Path) -> Checkpoint:
    """Return the checkpoint that a file says. Raises UserError where the file is damaged."""
    try:
        return Checkpoint.model_validate(values)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        why = f" ({problem['ctx']['error']})" if problem["type"] == "value_error" else ""
        raise UserError(f"{path}: damaged{why}; {RESTORE}") from None


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
        raise as_os_error(error) from None


def as_os_error(error: SafetensorError) -> OSError:
    """Return the operating system's error that safetensors tells of, as "... (os error 28)"."""
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]) if number else errno.EIO, str(error))


def sha256(file: BufferedReader) -> str:
    """Return the sha256 of an open file, in hexadecimal, and close the file. Raises OSError."""
    with file:
        return hashlib.file_digest(file, "sha256").hexdigest()
