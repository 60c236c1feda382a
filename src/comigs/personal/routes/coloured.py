"""Tokens in a terminal, each on a ground that says how much of it comes from what clients share.

The colours are those of the report: blue is the side of what clients share, orange a client's own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import click

from comigs.text import harmless

GENERALIST, SPECIALIST, NEITHER = (31, 99, 181), (214, 112, 30), (72, 72, 72)


@dataclass(frozen=True)
class Scale:
    """A scale says which weight has no colour, and how far from it a colour is whole."""

    middle: float = 0.5
    far: float = 0.5

    @property
    def legend(self) -> str:
        """Say which weights the colours are."""
        low, high = self.middle - self.far, self.middle + self.far
        return f"orange {low:.2f}, grey {self.middle:.2f}, blue {high:.2f}"

    def ground(self, weight: float) -> tuple[int, int, int]:
        """Return the colour of a weight as red, green, blue."""
        lean = (weight - self.middle) / self.far if self.far else 0.0
        side, strength = GENERALIST if lean > 0 else SPECIALIST, min(1.0, abs(lean))
        red, green, blue = (
            round(none + strength * (whole - none))
            for none, whole in zip(NEITHER, side, strict=True)
        )
        return red, green, blue


WHOLE = Scale()


def coloured(tokens: Iterable[tuple[str, float]], scale: Scale = WHOLE) -> str:
    """Return tokens with their weights as text for a terminal.

    Where standard output shows no colours, a token's weight stands behind it.
    """
    context = click.get_current_context(silent=True)
    plain = not click.get_text_stream("stdout").isatty() and not (context and context.color)
    written = []
    for text, weight in tokens:
        shown = harmless(text)
        if plain:
            written.append(f"{shown}[{weight:.2f}]")
            continue
        # A ground that goes over the end of a line would fill the line.
        parts = shown.split("\n")
        ground = scale.ground(weight)
        written.append("\n".join(click.style(p, fg="bright_white", bg=ground) for p in parts))
    return "".join(written)
