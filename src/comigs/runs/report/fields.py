"""Values out of a parsed JSON object, each with a check that says where it went wrong."""

from __future__ import annotations

import math
from typing import Any, NoReturn

from comigs.errors import UserError


class Fields:
    """A JSON object and the place it was read from. Every method raises UserError naming place and
    field.

    Numbers that are null, absent or not finite are None: not measured.
    """

    def __init__(self, where: str, values: Any) -> None:
        self.where = where
        if not isinstance(values, dict):
            raise UserError(f"{where}: expected an object, found {_short(values)}")
        self.values: dict[str, Any] = values

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(name) is not None

    def section(self, name: str) -> Fields:
        """A nested object."""
        if not isinstance(self.values.get(name), dict):
            self._refuse(name, "an object")
        return Fields(f"{self.where}: {name}", self.values[name])

    def text(self, name: str) -> str:
        """A string that must be there."""
        value = self.values.get(name)
        return value if isinstance(value, str) else self._refuse(name, "a text")

    def optional_text(self, name: str) -> str | None:
        """A string or None."""
        return self.text(name) if self.has(name) else None

    def integer(self, name: str) -> int:
        """A whole number that must be there."""
        value = self.values.get(name)
        return value if isinstance(value, int) and not isinstance(value, bool) else self._refuse(name, "a whole number")

    def optional_integer(self, name: str) -> int | None:
        """A whole number or None."""
        return self.integer(name) if self.has(name) else None

    def number(self, name: str) -> float | None:
        """A finite number or None."""
        return self._number(name, self.values.get(name))

    def numbers(self, name: str) -> tuple[float | None, ...] | None:
        """A list of numbers, or None where it is absent, null, or holds nulls only (nothing
        measured).
        """
        return self._numbers(name, self.values.get(name))

    def rows(self, name: str) -> tuple[tuple[float | None, ...], ...] | None:
        """A list of lists of numbers (a null row is empty), or None where nothing was measured."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, list):
            self._refuse(name, "a list of lists of numbers")
        rows = tuple(self._numbers(name, row) or () for row in value)
        return rows if any(rows) else None

    def _numbers(self, name: str, value: Any) -> tuple[float | None, ...] | None:
        if value is None:
            return None
        if not isinstance(value, list):
            self._refuse(name, "a list of numbers")
        numbers = tuple(self._number(name, v) for v in value)
        return numbers if any(v is not None for v in numbers) else None

    def _number(self, name: str, value: Any) -> float | None:
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool):
            self._refuse(name, "a number")
        return float(value) if math.isfinite(value) else None

    def _refuse(self, name: str, expected: str) -> NoReturn:
        found = _short(self.values[name]) if name in self.values else "nothing"
        raise UserError(f"{self.where}: {name}: expected {expected}, found {found}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
