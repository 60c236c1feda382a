"""The embedded base: a small pretrained English model of our own, shipped in the package
(docs/mini.md).
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer


def mini() -> tuple[Any, Any]:
    """GPT-2 architecture, 4 M parameters, 8k byte-level BPE, context 256."""
    folder = Path(str(files("comigs.bases") / "assets" / "mini"))
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


LOADERS = {"mini": mini}
