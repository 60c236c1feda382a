"""What is wrong with a config, in one line and in the words of someone who writes TOML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from comigs.errors import nearest

MUST = {  # pydantic's kinds of error in the words of someone who writes TOML
    "int_type": "a whole number", "int_parsing": "a whole number", "int_from_float": "a whole number",
    "float_type": "a number", "float_parsing": "a number", "finite_number": "a finite number",
    "bool_type": "true or false", "bool_parsing": "true or false", "string_type": "text in quotes",
    "greater_than": "above {gt}", "greater_than_equal": "{ge} or more", "less_than": "below {lt}",
    "less_than_equal": "{le} or less", "tuple_type": "a list", "path_type": "a path in quotes",
    "literal_error": "{expected}", "dict_type": "a section, or {{ key = value }}",
}  # fmt: skip


def one_line(
    error: ValidationError, tree: Mapping[str, Any], sections: Mapping[str, type[BaseModel]]
) -> str:
    """The first problem as `field: what was given; what is allowed`, and how many more there are.

    tree: what was given. sections: the class of each section by its name; "" is the whole.
    """
    first, *more = _problems(error)
    where = _place(first["loc"], tree)
    section = next(
        (sections[str(part)] for part in reversed(first["loc"][:-1]) if part in sections),
        sections[""],
    )
    message = _message(first, where, list(section.model_fields))
    rest = f" (and {len(more)} other problem{'s' if len(more) > 1 else ''})" if more else ""
    return f"{where}: {message}{rest}" if where else f"{message}{rest}"


def _message(problem: ErrorDetails, where: str, keys: list[str]) -> str:
    kind, given = problem["type"], repr(problem["input"])
    own = str(problem["msg"]).removeprefix("Value error, ")
    if not where:
        return own
    if kind == "extra_forbidden":
        return f"unknown key.{nearest(str(problem['loc'][-1]), keys)} Allowed: {', '.join(keys)}"
    if where == "clients" and kind in ("missing", "tuple_type"):
        return (
            'write [[clients]] (two brackets) with name = "..." and text = "...", once per client'
        )
    if kind == "missing":
        return "missing; it has no default"
    if problem["loc"][-1] == "str":
        allow = 'must be "source:argument" or a path, or {train = ..., valid = ..., test = ...}'
    elif kind == "model_type":
        allow = (
            "must be a [[clients]] section"
            if where.startswith("clients.")
            else f"must be a section: [{where}]"
        )
    elif kind in MUST:
        allow = "must be " + MUST[kind].format(**problem.get("ctx", {}))
    else:
        allow = own
    if kind == "literal_error":
        close = nearest(str(problem["input"]), re.findall(r"'(.*?)'", allow))
        allow += f".{close}" if close else ""
    return f"given {given if len(given) <= 80 else given[:77] + '...'}; {allow}"


def _problems(error: ValidationError) -> list[ErrorDetails]:
    """What is wrong, unknown keys first. `text` may be two things: what is wrong with the one that
    was meant.
    """
    problems = error.errors()
    inside = {
        p["loc"][: p["loc"].index("Text")]
        for p in problems
        if "Text" in p["loc"] and p["type"] != "model_type"
    }
    problems = [p for p in problems if p["loc"][-1:] != ("Text",)]
    problems = [p for p in problems if p["loc"][-1:] != ("str",) or p["loc"][:-1] not in inside]
    return sorted(problems, key=lambda p: p["type"] != "extra_forbidden")


def _place(location: tuple[int | str, ...], tree: Mapping[str, Any]) -> str:
    """`client.steps`, or `clients.fr.rank` where the client has a name."""
    parts = [str(part) for part in location if part not in ("Text", "str")]
    if location[:1] == ("clients",) and len(location) > 1:
        entry = tree["clients"][location[1]]
        parts[1] = str(entry.get("name", parts[1])) if isinstance(entry, Mapping) else parts[1]
    return ".".join(parts)
