"""This shape is a question and its answer."""

from __future__ import annotations

from comigs.data.document import Turn
from comigs.data.shapes import Row, answer, field

FIELDS = (("question", "answer"),)


def turns(row: Row, where: str) -> tuple[Turn, ...]:
    """Return the two turns. Raises UserError."""
    return ("user", field(row, "question", where)), ("assistant", answer(row, "answer", where))
