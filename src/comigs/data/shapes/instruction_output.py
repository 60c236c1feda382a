"""This shape is an instruction, what it is about (`input`, which may be absent), and the output."""

from __future__ import annotations

from comigs.data.document import Turn
from comigs.data.shapes import Row, answer, field

FIELDS = (("instruction", "output"),)
OPTIONAL = ("input",)


def turns(row: Row, where: str) -> tuple[Turn, ...]:
    """Return the two turns; the input stands below the instruction. Raises UserError."""
    asked, output = field(row, "instruction", where), answer(row, "output", where)
    if row.get("input") is not None and (about := field(row, "input", where)).strip():
        asked = f"{asked}\n\n{about}"
    return ("user", asked), ("assistant", output)
