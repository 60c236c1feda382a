"""These bases have the shapes of well-known models, and seeded random weights.

They know no language: they are for measuring memory and speed where the real weights are not at
hand. Shapes are those of the models' own config.json.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import LlamaConfig, PretrainedConfig, Qwen3Config

from comigs.bases.base import Loader
from comigs.bases.tiny import byte_tokenizer, seeded


def smollm2_135m() -> PretrainedConfig:
    """Return SmolLM2-135M's shape."""
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )


def llama_3_2_1b() -> PretrainedConfig:
    """Return Llama 3.2 1B's shape."""
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
    )


def qwen3_1_7b() -> PretrainedConfig:
    """Return Qwen3 1.7B's shape."""
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
    )


def randomized(shape: Callable[[], PretrainedConfig]) -> tuple[Any, Any]:
    """Return a model of that shape in bfloat16, as such models ship, and a byte tokenizer."""
    # The separator of the byte tokenizer ends a text here, as a shape's own does not exist.
    config, tokenizer = shape(), byte_tokenizer()
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    return seeded(config, dtype=torch.bfloat16), tokenizer


SIZES = {
    "random-smollm2-135m": (smollm2_135m, "SmolLM2-135M's"),
    "random-llama-3.2-1b": (llama_3_2_1b, "Llama 3.2 1B's"),
    "random-qwen3-1.7b": (qwen3_1_7b, "Qwen3 1.7B's"),
}
LOADERS = {
    name: Loader(partial(randomized, shape), f"{whose} shape with random weights: for speed alone.")
    for name, (shape, whose) in SIZES.items()
}
