"""This source is JSON lines, plain or gzipped: each line's field `text` is a document."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from comigs.data.document import Document
from comigs.data.files import decode, reading, resolve
from comigs.errors import UserError

SUMMARY = "jsonl:FILE: a .jsonl or .jsonl.gz file, each line an object with a field `text`"
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
    found = False
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
                yield Document(_text(line, f"{path}:{number}"), f"{path.name}:{number}")
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


def _text(line: str, where: str) -> str:
    """Return the field `text` of one line."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    # JSON may be right and still more than Python's reader takes.
    except (ValueError, RecursionError):
        raise UserError(
            f"{where}: a number too long or lists too deep to be read; only `text` is used"
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: not an object with a field `text`")
    if "text" not in value:
        fields = ", ".join(value) or "none"
        raise UserError(f"{where}: the field `text` is missing; fields there are: {fields}")
    text = value["text"]
    if not isinstance(text, str):
        what = "null" if text is None else "not a string"
        raise UserError(f"{where}: the field `text` is {what}; leave the line out, or fill it in")
    return text
