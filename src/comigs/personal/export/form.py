"""The Format record, and how a format is found: by the name of its file in `formats/`.

A new format is a new file with `FORMAT = Format(...)`; `formats/gguf_base.py` is `gguf-base`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comigs.errors import UserError, nearest
from comigs.personal.export import formats
from comigs.personal.export.outputs import Outputs
from comigs.personal.export.source import Source

LOGITS = 1e-3  # how far logits of an exact export may be from ours in float32
PERPLEXITY = {"float16": 1e-3, "bfloat16": 1e-2, "q8_0": 2e-2}
"""How far, as a fraction, storing a model in that type may move its perplexity. Types of 4 and 5
bits have no bound: what they cost is measured and said."""


@dataclass(frozen=True)
class Written:
    """This record says what a format wrote, and what that must answer when it is read back.

    expected are the answers of the model as it was before it was stored. exact says that these are
    the run's own answers; else they are near them, and the cost is said. notes are sentences for
    the model card.
    """

    expected: Outputs
    exact: bool
    notes: Sequence[str] = field(default_factory=tuple)


@dataclass(frozen=True)
class Format:
    """A format is one way to write a personal model down.

    summary is one line for people. types are the number types that it can be stored in, the first
    by default; refused gives the reason for types that people may ask for and cannot have.
    write(source, folder, type) fills the folder. read(source, folder) is a context that gives a
    model with transformers' way of answering, made from the files alone and, where the format
    needs a base, the source's. run(source) gives the lines of the card that say how to run it.
    holds says which parts of the client's model are in it.
    """

    summary: str
    types: tuple[str, ...]
    write: Callable[[Source, Path, str], Written]
    read: Callable[[Source, Path], AbstractContextManager[Any]]
    run: Callable[[Source], str]
    refused: Callable[[str], str | None] = lambda type: None
    holds: tuple[str, ...] = ("experts", "router")


def list_formats() -> list[str]:
    """Return the names of all formats, as users type them."""
    return [i.name.replace("_", "-") for i in pkgutil.iter_modules(formats.__path__)]


def load_format(name: str) -> Format:
    """Return the format of that name. Raises UserError naming the formats there are."""
    known = list_formats()
    if name not in known:
        raise UserError(
            f'--to: given "{name}"; must be one of {", ".join(known)}.{nearest(name, known)}'
        )
    module = importlib.import_module(f"{formats.__name__}.{name.replace('-', '_')}")
    found: Format = module.FORMAT
    return found


def type_of(name: str, found: Format, given: str | None) -> str:
    """Return the number type to store in, by default the format's first. Raises UserError."""
    if given is None:
        return found.types[0]
    if given in found.types:
        return given
    reason = found.refused(given)
    allowed = f"{name} is stored in {', '.join(found.types)}"
    raise UserError(
        f'--type: given "{given}"; {reason or allowed}.{nearest(given, [*found.types])}'
    )
