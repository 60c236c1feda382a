"""Where text comes from: each file here is one source, found by its name.

A source has `load(argument, root) -> Iterator[Document]`, which never holds the whole text and
yields the same documents in the same order each time, and says SUMMARY, VERSION and LICENSE.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from comigs.data.document import Document
from comigs.data.files import reading, resolve
from comigs.errors import UserError, nearest


class SourceInfo(NamedTuple):
    """What `comigs list` shows of a source."""

    name: str
    summary: str
    version: str
    license: str


def source_names() -> list[str]:
    """Names of all sources, as written in a config (`debian-faq` is the file debian_faq.py)."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


def list_sources() -> list[SourceInfo]:
    """All sources with what they say about themselves."""
    modules = {
        name: import_module(f"{__name__}.{name.replace('-', '_')}") for name in source_names()
    }
    return [SourceInfo(name, m.SUMMARY, m.VERSION, m.LICENSE) for name, m in modules.items()]


def open_source(spec: str, root: Path) -> Iterator[Document]:
    """The documents of "source:argument" or of a path, relative to `root`.

    A path may be a folder, a .txt or .md file, or a .jsonl or .jsonl.gz file.
    Raises UserError at once for an unknown source or path, and while iterating for what is wrong
    inside.
    """
    name, argument = _parse(spec, root)
    module = import_module(f"{__name__}.{name.replace('-', '_')}")
    documents: Iterator[Document] = module.load(argument, root)
    return documents


def _parse(spec: str, root: Path) -> tuple[str, str]:
    """Name of the source and its argument."""
    names = source_names()
    name, colon, argument = spec.partition(":")
    if name in names and argument:
        return name, argument
    path = resolve(spec, root)
    with reading(path):
        exists = path.exists()
    if (name in names and not exists) or not spec:
        raise UserError(
            f'text "{spec}": give a path or SOURCE:ARGUMENT; `comigs list` shows the sources'
        )
    if colon and not exists:
        raise UserError(
            f'text "{spec}": no source "{name}"; there are: {", ".join(names)}.{nearest(name, names)}'
        )
    if not exists:
        raise UserError(f"{path}: no such file or folder")
    return ("jsonl" if path.name.lower().endswith((".jsonl", ".jsonl.gz")) else "folder"), spec
