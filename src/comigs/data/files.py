"""This module reads what a user names: whatever goes wrong becomes one line about that file."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from comigs.config.paths import resolve as resolve
from comigs.errors import UserError

BYTE_ORDER_MARK = "\ufeff"


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn errors of the file system and of gzip into UserErrors that name the file."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{error.filename or path}: no such file or folder") from None
    except PermissionError as error:
        raise UserError(f"{error.filename or path}: no permission to read it") from None
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise UserError(f"{path}: not a whole gzip file; copy or compress it again") from None
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"{error.filename or path}: cannot be read: {why}") from None


def decode(raw: bytes, where: str, offset: int = 0) -> str:
    """Return UTF-8 as text, without a byte order mark at the start of the file.

    `where` names the file in a message; `offset` bytes of it come before `raw`. Raises UserError.
    """
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        place = f"byte {offset + error.start} (0x{raw[error.start]:02x})"
        if offset == 0 and raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            place += ", as UTF-16 begins"
        raise UserError(f"{where}: not UTF-8 at {place}; save the file as UTF-8") from None
    return text.removeprefix(BYTE_ORDER_MARK) if offset == 0 else text
