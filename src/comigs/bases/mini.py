"""This base is mini: a small pretrained English model of our own, in the package (docs/mini.md)."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from comigs.bases.base import Loader
from comigs.bases.pretrained import load_pretrained


def mini() -> tuple[Any, Any]:
    """Load the model and its tokenizer."""
    folder = Path(str(files("comigs.bases") / "assets" / "mini"))
    return load_pretrained(folder)


SUMMARY = "GPT-2 architecture, 4 M parameters, 8k byte-level BPE, context 256."
LOADERS = {"mini": Loader(mini, SUMMARY)}
LICENSE = "Apache-2.0"
