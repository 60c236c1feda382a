"""This room says where text comes from: each file here is one source, found by its name.

A source has `load(argument, root) -> Iterator[Document]`, which never holds the whole text and
yields the same documents in the same order each time, and says SUMMARY, VERSION and LICENSE. Where
it passes over anything, `left_out(argument, root) -> dict[str, int]` counts it, by what it is.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from comigs.data.document import Document
from comigs.data.files import reading, resolve
from comigs.errors import UserError, nearest

ROWS = {".jsonl": "jsonl", ".jsonl.gz": "jsonl", ".parquet": "parquet", ".csv": "csv"}
"""The source of files of rows, by how their names end."""


class SourceInfo(NamedTuple):
    """A source's line in what `comigs list` shows."""

    name: str
    summary: str
    version: str
    license: str


def source_names() -> list[str]:
    """Return all sources as written in a config (`debian-faq` is the file debian_faq.py)."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


def list_sources() -> list[SourceInfo]:
    """Return all sources with what they say about themselves."""
    found = []
    for name in source_names():
        source = _module(name)
        found.append(SourceInfo(name, source.SUMMARY, source.VERSION, source.LICENSE))
    return found


def open_source(spec: str, root: Path) -> Iterator[Document]:
    """Return the documents of "source:argument" or of a path, relative to `root`.

    A path may be a folder, a .txt or .md file, or a file of ROWS. Raises UserError at once for an
    unknown source or path, and while iterating for what is wrong inside.
    """
    name, argument = _parse(spec, root)
    documents: Iterator[Document] = _module(name).load(argument, root)
    return documents


def left_out(spec: str, root: Path) -> dict[str, int]:
    """Return how many of what a source passes over: what it is -> its number. Raises UserError."""
    name, argument = _parse(spec, root)
    count = getattr(_module(name), "left_out", None)
    return dict(count(argument, root)) if count is not None else {}


def _module(name: str) -> ModuleType:
    return import_module(f"{__name__}.{name.replace('-', '_')}")


def _parse(spec: str, root: Path) -> tuple[str, str]:
    """Return the name of the source and its argument."""
    names = source_names()
    name, colon, argument = spec.partition(":")
    if name in names and argument:
        return name, argument
    # What is no source is a path, which may have a colon or a source's name.
    path = resolve(spec, root)
    with reading(path):
        exists = path.exists()
    if (name in names and not exists) or not spec:
        raise UserError(
            f'text "{spec}": give a path or SOURCE:ARGUMENT; `comigs list` shows the sources'
        )
    if colon and not exists:
        known = f"{', '.join(names)}.{nearest(name, names)}"
        raise UserError(f'text "{spec}": no source "{name}"; there are: {known}')
    if not exists:
        raise UserError(f"{path}: no such file or folder")
    for ending, source in ROWS.items():
        if path.name.lower().endswith(ending):
            return source, spec
    return "folder", spec
