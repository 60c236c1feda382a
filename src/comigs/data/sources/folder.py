"""This source is a folder of .txt and .md files, or one such file: each file is a document."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from stat import S_ISDIR

from comigs.data.document import Document
from comigs.data.files import decode, reading, resolve
from comigs.errors import UserError

SUMMARY = "folder:PATH: every .txt and .md file under a folder, each a document (or one such file)"
VERSION = "-"
LICENSE = "as your files"

SUFFIXES = (".txt", ".md")


def load(argument: str, root: Path) -> Iterator[Document]:
    """Yield the files in the order of their paths.

    Hidden files and folders are left out, and links to folders not followed.
    """
    path = resolve(argument, root)
    found = False
    for file, name in _files(path):
        found = True
        with reading(file):
            raw = file.read_bytes()
        yield Document(decode(raw, str(file)), name, key=name)
    if not found:
        raise UserError(f"{path}: no .txt or .md file in this folder")


def _files(path: Path) -> Iterator[tuple[Path, str]]:
    """Yield each file with its path inside the folder."""
    with reading(path):
        is_folder = S_ISDIR(path.stat().st_mode)
    if not is_folder:
        if not path.name.lower().endswith(SUFFIXES):
            raise UserError(f"{path}: not a folder, nor a .txt, .md, .jsonl or .jsonl.gz file")
        yield path, path.name
        return
    with reading(path):
        for folder, inner, files in os.walk(path, onerror=_raise):
            # os.walk goes on with what is left in `inner`, in that order.
            inner[:] = sorted(name for name in inner if not name.startswith("."))
            for name in sorted(files):
                if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                    file = Path(folder, name)
                    yield file, file.relative_to(path).as_posix()


def _raise(error: OSError) -> None:
    """Raise the error, as os.walk would leave out a folder that it may not read."""
    raise error
