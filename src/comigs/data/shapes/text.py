"""This shape is plain text: a row's field `text` is a document, learnt whole."""

from __future__ import annotations

from comigs.data.shapes import Row, field

FIELDS = (("text",),)


def text(row: Row, where: str) -> str:
    """Return a row's text. Raises UserError."""
    return field(row, "text", where)
