"""This source is JSON lines, plain or gzipped: each line's field `text` is a document."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from comigs.data.document import Document
from comigs.data.files import decode, reading, resolve
from comigs.errors import UserError

SUMMARY = "jsonl:FILE: a .jsonl or .jsonl.gz file, each line an object with a field `text`"
VERSION = "-"
LICENSE = "as your file"


def load(argument: str, root: Path) -> Iterator[Document]:
    """Yield the lines in order; empty lines are skipped."""
    path = resolve(argument, root)
    offset = 0  # bytes before the line, uncompressed
    found = False
    with reading(path), _open(path) as lines:
        for number, raw in enumerate(lines, 1):
            line = decode(raw, f"{path}:{number}", offset)
            offset += len(raw)
            if not line.isspace():
                found = True
                yield Document(_text(line, f"{path}:{number}"), f"{path.name}:{number}")
    if not found:
        raise UserError(f"{path}: the file is empty")


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
        raise UserError(f"{where}: the field `text` is not a string")
    return text
