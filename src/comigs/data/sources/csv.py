"""This source is a CSV file with a header: each row is a text or a chat (data/shapes)."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from comigs.data.document import Document
from comigs.data.files import reading, resolve
from comigs.data.shapes import Reader
from comigs.errors import UserError

SUMMARY = "csv:FILE: a .csv file, each row a text (`text`) or a chat (`question`, `answer`, ...)"
VERSION = "-"
LICENSE = "as your file"

LONGEST_CELL = 1 << 28  # characters
OTHERS = (";", "\t", "|")  # what programs write between cells where it is no comma


def load(argument: str, root: Path) -> Iterator[Document]:
    """Yield the rows in order. Raises UserError."""
    path, reader, found = resolve(argument, root), Reader(), False
    # The library's own limit, which is the whole process's, is an eighth of a megabyte.
    csv.field_size_limit(LONGEST_CELL)
    with reading(path), path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file, strict=True)
        try:
            _require_commas(path, list(rows.fieldnames or ()))
            for row in rows:
                found, number = True, rows.line_num
                if None in row:
                    raise UserError(f"{path}:{number}: has more cells than the first line")
                yield reader.document(row, f"{path}:{number}", f"{path.name}:{number}")
        except csv.Error as error:
            raise UserError(f"{path}: not CSV after line {rows.line_num}: {error}") from None
        except UnicodeDecodeError as error:
            byte = f"0x{error.object[error.start]:02x}"
            raise UserError(
                f"{path}: not UTF-8 after line {rows.line_num} ({byte}); save the file as UTF-8"
            ) from None
    if not found:
        raise UserError(f"{path}: the file has no rows")


def _require_commas(path: Path, header: list[str]) -> None:
    """Refuse a table whose cells stand between other characters. Raises UserError."""
    for other in OTHERS:
        if len(header) == 1 and other in header[0]:
            raise UserError(f"{path}: its cells are separated by {other!r}; save it with commas")
