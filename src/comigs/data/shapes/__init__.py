"""This room says how a row of data becomes a document: each file here is one shape of rows.

A shape has FIELDS, the sets of fields by which its rows are known, `turns(row, where)`, which
returns what was said, and perhaps OPTIONAL, the fields that it reads where they are there. Only
`text` has no turns: its rows are plain text. Rows have the shape of the first row of their file.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

from comigs.data.document import PLAIN, Document, chat
from comigs.errors import UserError
from comigs.text import brief, listed

Row = Mapping[str, Any]
EMPTY = (None, "")  # what a table has where a row has nothing
LONGEST = 300  # characters of the names of a row's fields in a message
ORDER = (PLAIN, "messages")  # looked for first: other fields beside these say something of them


@cache
def shapes() -> dict[str, ModuleType]:
    """Return all shapes by name, in the order in which they are looked for."""
    names = {module.name for module in pkgutil.iter_modules(__path__)}
    ordered = [*ORDER, *sorted(names - {*ORDER})]
    return {name.replace("_", "/"): import_module(f"{__name__}.{name}") for name in ordered}


class Reader:
    """A reader makes documents of the rows of one file, which all have one shape."""

    def __init__(self) -> None:
        self.shape = ""  # of the first row, once it was read
        self.first = ""  # where that was

    def document(self, row: Row, where: str, name: str) -> Document:
        """Return a row as a document. `where` and `name` are the row's place, whole and short.

        Raises UserError for a row of another shape than the first, or with a field that cannot be.
        """
        found = shape_of(row, self.shape)
        if not self.shape:
            self.shape, self.first = found or PLAIN, name
        # A row without any of a shape's fields lacks one of this shape; that is said below.
        if found not in ("", self.shape):
            raise mixed(where, found, self.first, self.shape)
        shape = shapes()[self.shape]
        if self.shape == PLAIN:
            document = Document(shape.text(row, where), name)
        else:
            document = chat(shape.turns(row, where), self.shape, name)
        filled = [name for name, value in row.items() if value not in EMPTY]
        unread = tuple(name for name in filled if name not in _read(self.shape))
        return replace(document, unread=unread)


def shape_of(row: Row, expected: str = "") -> str:
    """Return the name of a row's shape, "" where it has none that is known.

    What is null or empty counts as absent, since in a table every row has every column. A row that
    has no shape by what is left has the expected one, where it has its columns.
    """
    if found := _shapes_with({key for key, value in row.items() if value not in EMPTY}):
        return found[0]
    found = _shapes_with({*row})
    return expected if expected in found else (found or [""])[0]


def _shapes_with(fields: Set[str]) -> list[str]:
    """Return the names of the shapes of which all fields are there."""
    found = []
    for name, shape in shapes().items():
        if any(fields >= {*wanted} for wanted in shape.FIELDS):
            found.append(name)
    return found


def unread_lines(spec: str, shape: str, unread: Sequence[str]) -> list[str]:
    """Return lines that say what of a source's rows is not read, where that may be missed."""
    # Beside plain text stands where it is from; beside a question may stand what it is about.
    if unread and shape != PLAIN:
        return [f'columns of "{spec}" that are not read: {brief(listed(unread))}']
    lines = []
    for name in _shapes_with({*unread}):
        why = "`text` is read first; take it out where the others are to be learnt"
        lines.append(f'rows of "{spec}" are plain text and {name}, too: {why}')
    return lines


@cache
def _read(name: str) -> frozenset[str]:
    """Return the fields that a shape reads."""
    shape = shapes()[name]
    return frozenset(getattr(shape, "OPTIONAL", ())).union(*shape.FIELDS)


def mixed(where: str, found: str, first: str, expected: str) -> UserError:
    """Return the error of a row that has another shape than a client's first row."""
    return UserError(
        f"{where}: is {found}, but {first} is {expected}; a client's rows all have one shape: "
        "put the others into a client of their own"
    )


def field(row: Row, name: str, where: str) -> str:
    """Return a field that must be text. Raises UserError."""
    if name not in row:
        there = ", ".join(map(str, row))[:LONGEST] or "none"
        known = [" and ".join(shape.FIELDS[0]) for shape in shapes().values()]
        raise UserError(
            f"{where}: the field `{name}` is missing; fields there are: {there}; "
            f"rows have {'; or '.join(known)}"
        )
    value = row[name]
    if not isinstance(value, str):
        what = "null" if value is None else "not a string"
        raise UserError(f"{where}: the field `{name}` is {what}; leave the line out, or fill it in")
    return value


def answer(row: Row, name: str, where: str) -> str:
    """Return a field that must say something. Raises UserError."""
    words = field(row, name, where)
    if not words.strip():
        raise UserError(
            f"{where}: the answer (`{name}`) is empty; leave the line out, or fill it in"
        )
    return words
