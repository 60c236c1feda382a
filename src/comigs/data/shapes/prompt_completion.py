"""This shape is a prompt and its completion, as a message and its answer."""

from __future__ import annotations

from comigs.data.document import Turn
from comigs.data.shapes import Row, answer, field

FIELDS = (("prompt", "completion"),)


def turns(row: Row, where: str) -> tuple[Turn, ...]:
    """Return the two turns. Raises UserError."""
    prompt, completion = field(row, "prompt", where), answer(row, "completion", where)
    return ("user", prompt), ("assistant", completion)
