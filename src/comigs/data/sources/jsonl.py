"""This source is JSON lines, plain or gzipped: each line is a text, or a chat (data/shapes)."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from comigs.data.document import Document
from comigs.data.files import decode, reading, resolve
from comigs.data.shapes import Reader
from comigs.errors import UserError

SUMMARY = (
    "jsonl:FILE: a .jsonl or .jsonl.gz file, each line a text (`text`) or a chat (`messages`, ...)"
)
VERSION = "-"
LICENSE = "as your file"

LONGEST_LINE = 1 << 28  # bytes
GROWTH = 300  # times that a compressed file may grow; text grows 3 to 20 times
SMALL = 1 << 27  # bytes that any file may grow to


def load(argument: str, root: Path) -> Iterator[Document]:
    """Yield the lines in order; empty lines are skipped."""
    # One text over several lines is told apart at its start, where the parser's words mislead.
    path = resolve(argument, root)
    offset = 0  # bytes before the line, uncompressed
    reader, found = Reader(), False
    with reading(path), _open(path) as lines:
        for number, raw in enumerate(_lines(path, lines), 1):
            line = decode(raw, f"{path}:{number}", offset)
            offset += len(raw)
            if not line.isspace():
                start = line.strip()
                if not found and (start in ("[", "{") or start.startswith("[{")):
                    raise UserError(
                        f"{path}: one JSON text over the whole file, not JSON lines; write one "
                        "object in each line (jq -c '.[]' does)"
                    )
                found = True
                where = f"{path}:{number}"
                yield reader.document(_row(line, where), where, f"{path.name}:{number}")
    if not found:
        raise UserError(f"{path}: the file is empty")


def _lines(path: Path, lines: BinaryIO) -> Iterator[bytes]:
    """Yield the lines. Raises UserError where a file grows without end as it is unpacked."""
    # A few megabytes can hold terabytes of zeros, and one line of them fills the memory.
    size = 0
    most = max(SMALL, GROWTH * os.stat(path).st_size)
    while line := lines.readline(LONGEST_LINE + 1):
        size += len(line)
        if len(line) > LONGEST_LINE:
            raise UserError(f"{path}: has a line of more than {LONGEST_LINE:,} bytes")
        if size > most:
            raise UserError(
                f"{path}: grows to more than {GROWTH} times its size as it is unpacked; "
                "give it unpacked where that is right"
            )
        yield line


def _open(path: Path) -> BinaryIO:
    if path.name.lower().endswith(".gz"):
        return cast(BinaryIO, gzip.open(path))
    return path.open("rb")


def _row(line: str, where: str) -> dict[str, Any]:
    """Return the object that a line is. Raises UserError."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    # JSON may be right and still more than Python's reader takes.
    except (ValueError, RecursionError):
        raise UserError(
            f"{where}: a number too long or lists too deep to be read; leave the field out"
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: not an object with a field `text`, or those of a chat")
    return value
