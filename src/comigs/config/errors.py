"""This module says what is wrong with a config in one line, to somebody who writes TOML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from comigs.errors import nearest
from comigs.text import plural

MUST = {  # pydantic's kind of error -> what the value must be
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text in quotes",
    "greater_than": "above {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "below {lt}",
    "less_than_equal": "{le} or less",
    "tuple_type": "a list",
    "path_type": "a path in quotes",
    "literal_error": "{expected}",
    "dict_type": "a section, or {{ key = value }}",
    "option_type": "true or false, a number, or text in quotes",
}


def one_line(
    error: ValidationError, tree: Mapping[str, Any], sections: Mapping[str, type[BaseModel]]
) -> str:
    """Return the first problem as `field: what was given; what is allowed`, and count the others.

    tree: what was given. sections: the class of each section by its name; "" is the whole.
    """
    first, *more = _problems(error)

    # an unknown key is compared with those of the innermost section that it stands in
    section, above = sections[""], ""
    for part in first["loc"][:-1]:
        if isinstance(part, str):
            section = sections.get(f"{above}{part}", section)
            above += f"{part}."

    where = _place(first["loc"], tree)
    message = _message(first, where, list(section.model_fields))
    if more:
        message += f" (and {plural(len(more), 'other problem')})"
    return f"{where}: {message}" if where else message


def _message(problem: ErrorDetails, where: str, keys: list[str]) -> str:
    kind, given = problem["type"], repr(problem["input"])

    # without a place, or a value, there is nothing to repeat
    if not where:
        return _own_words(problem)
    if kind == "extra_forbidden":
        close = nearest(str(problem["loc"][-1]), keys)
        return f"unknown key.{close} Allowed: {', '.join(keys)}"
    if where == "clients" and kind in ("missing", "tuple_type"):
        return (
            'write [[clients]] (two brackets) with name = "..." and text = "...", once per client'
        )
    if kind == "missing":
        return "missing; it has no default"

    # a whole text given by mistake must not flood the line
    if len(given) > 80:
        given = given[:77] + "..."
    return f"given {given}; {_allowed(problem, where)}"


def _allowed(problem: ErrorDetails, where: str) -> str:
    """Return what the value at that place must be."""
    kind = problem["type"]
    if problem["loc"][-1] == "str":
        return 'must be "source:argument" or a path, or {train = ..., valid = ..., test = ...}'
    if kind == "model_type" and where.startswith("clients."):
        return "must be a [[clients]] section"
    if kind == "model_type":
        return f"must be a section: [{where}]"
    if kind not in MUST:
        return _own_words(problem)
    allowed = "must be " + MUST[kind].format(**problem.get("ctx", {}))
    if kind == "literal_error":
        close = nearest(str(problem["input"]), re.findall(r"'(.*?)'", allowed))
        if close:
            allowed += f".{close}"
    return allowed


def _own_words(problem: ErrorDetails) -> str:
    """Return what a validator of ours, or pydantic, has said itself."""
    return str(problem["msg"]).removeprefix("Value error, ")


def _problems(error: ValidationError) -> list[ErrorDetails]:
    """Return what is wrong, unknown keys first.

    A client's `text` may be a string or a section. pydantic complains about both; only what is
    wrong with the one that was meant is kept. Of an option, which may be of several kinds, it
    complains once for each.
    """
    inside = set()  # places of texts that were meant as sections
    for problem in error.errors():
        if "Text" in problem["loc"] and problem["type"] != "model_type":
            inside.add(problem["loc"][: problem["loc"].index("Text")])
    kept: list[ErrorDetails] = []
    for problem in error.errors():
        if problem["loc"][:1] == ("options",) and len(problem["loc"]) == 3:
            option = problem["loc"][:2]
            if all(known["loc"] != option for known in kept):
                kept.append(problem | {"loc": option, "type": "option_type"})
            continue
        *place, last = ("", *problem["loc"])
        if last != "Text" and (last != "str" or tuple(place[1:]) not in inside):
            kept.append(problem)
    return sorted(kept, key=lambda problem: problem["type"] != "extra_forbidden")


def _place(location: tuple[int | str, ...], tree: Mapping[str, Any]) -> str:
    """Return the place as --set names it: `client.steps`, or `clients.fr.rank` with a name."""
    parts = [str(part) for part in location if part not in ("Text", "str")]
    if location[:1] == ("clients",) and len(location) > 1:
        entry = tree["clients"][location[1]]
        if isinstance(entry, Mapping):
            parts[1] = str(entry.get("name", parts[1]))
    return ".".join(parts)
