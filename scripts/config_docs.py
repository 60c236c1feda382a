"""This script writes docs/config.md from the descriptions in comigs/config: `make docs`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from comigs.config import SECTIONS
from comigs.methods.loading import list_methods, method_module

PAGE = Path(__file__).parents[1] / "docs" / "config.md"
TITLES = {
    "": "At the top",
    "clients": "[[clients]]",
    "conditions.groups": "[conditions.groups.NAME], beside what [conditions] has",
    "clients.text": "text = {...} of a client",
}
WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", Path: "path"}
BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
INTRO = """# The config

Made from `src/comigs/config` by `make docs`; do not edit. A run is one TOML file;
`configs/quickstart.toml` is a short one. What is not in the file has its default, and the resolved
config is written into the run. Unknown keys are refused. A default of "none" cannot be written in
TOML: leave the key out. On the command line: `--set client.steps=20`,
`--set clients.fr.specialists=2`.

A path may begin with `~`; a relative one starts from the folder of the file that names it, in the
config of a run as well. What is given but read by nobody, as a setting of routers with a method
that has none, is refused where it would make another run than was asked for, else said in one line.
"""


def kind(annotation: Any) -> str:
    """Return a field's type in words; None is left out, as the default says it."""
    options = [a for a in get_args(annotation) if a not in (type(None), Ellipsis)]
    if get_origin(annotation) in (dict, Mapping):
        return f"table of {kind(options[1])}".replace("of section", "of sections")
    if get_origin(annotation) is Literal:
        return ", ".join(f'`"{option}"`' for option in options)
    words = " or ".join(dict.fromkeys(map(kind, options))) or WORDS.get(annotation, "section")
    return f"list of {words}" if get_origin(annotation) is tuple else words


def row(key: str, field: FieldInfo) -> str:
    """Return a line of a table; the default as TOML has it."""
    allowed = [kind(field.annotation)]
    for bound in field.metadata:
        for name, words in BOUNDS.items():
            if hasattr(bound, name):
                allowed.append(f"{words} {getattr(bound, name):g}")
    default = f"`{json.dumps(field.default, default=str)}`"
    if field.is_required():
        default = "required"
    elif field.default is None:
        default = "none"
    return f"| `{key}` | {', '.join(allowed)} | {default} | {field.description} |"


def table(fields: Mapping[str, FieldInfo]) -> str:
    """Return a section's table."""
    rows = ["| field | type | default | what |", "|---|---|---|---|"]
    return "\n".join([*rows, *(row(key, field) for key, field in fields.items())])


def options_of_methods() -> Iterator[str]:
    """Yield a section for each method that has options of its own."""
    yield "## [options], by method\n"
    for name in list_methods():
        options = getattr(method_module(name), "Options", None)
        if options is not None:
            yield f"### {name}\n\n{table(options.model_fields)}\n"


def page() -> str:
    """Return the whole page."""
    parts = [INTRO]
    for name, section in SECTIONS.items():
        if name == "conditions.clients":  # what it holds is in the table of [conditions]
            continue
        own = {}
        for key, field in section.model_fields.items():
            told = name == "conditions.groups" and key in SECTIONS["conditions"].model_fields
            if not told and (name or key not in SECTIONS):  # a section has a table of its own
                own[key] = field
        parts.append(f"## {TITLES.get(name, f'[{name}]')}\n\n{table(own)}\n")
    parts += options_of_methods()
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
