"""This source is a Parquet file: each row is a text or a chat (data/shapes)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from comigs.data.document import Document
from comigs.data.files import reading, resolve
from comigs.data.shapes import Reader
from comigs.errors import UserError

SUMMARY = "parquet:FILE: a .parquet file, each row a text (`text`) or a chat (`messages`, ...)"
VERSION = "-"
LICENSE = "as your file"

AT_ONCE = 256  # rows in memory


def load(argument: str, root: Path) -> Iterator[Document]:
    """Yield the rows in order. Raises UserError."""
    # The library is an extra, and takes a second to import.
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"parquet:{argument}: needs the `pyarrow` library; pip install 'comigs[hub]'"
        ) from None
    path, reader, number = resolve(argument, root), Reader(), 0
    try:
        with reading(path), pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(AT_ONCE):
                for row in batch.to_pylist():
                    number += 1
                    yield reader.document(row, f"{path}: row {number}", f"{path.name}:{number}")
    except UnicodeDecodeError as error:
        byte = f"0x{error.object[error.start]:02x}"
        raise UserError(
            f"{path}: not UTF-8 after row {number} ({byte}); save it as UTF-8"
        ) from None
    except pyarrow.ArrowException as error:
        why = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: not a whole Parquet file: {why}") from None
    if not number:
        raise UserError(f"{path}: the file has no rows")
