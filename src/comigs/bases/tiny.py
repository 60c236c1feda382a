"""These bases are seeded random models of a few thousand parameters with a byte tokenizer.

They are for tests, and know no language.
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from comigs.bases.base import Loader

SEPARATOR = "<|endoftext|>"


def byte_tokenizer() -> Any:
    """Return a tokenizer with one token per byte, and the separator as number 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SEPARATOR, eos_token=SEPARATOR
    )


def seeded(config: PretrainedConfig, **settings: Any) -> Any:
    """Return a model of this shape with random weights, the same ones each time.

    `settings` go to `transformers`' from_config. The global generator stays as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, **settings)


def tiny_gpt2() -> tuple[Any, Any]:
    """Make a GPT-2-like model: 2 blocks of width 16."""
    # It trains without dropout, as every base here.
    config = GPT2Config(
        vocab_size=257,
        n_positions=64,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=256,
        eos_token_id=256,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.2,
    )
    return seeded(config), byte_tokenizer()


def tiny_llama() -> tuple[Any, Any]:
    """Make a Llama-like model: 2 blocks of width 16, grouped-query attention."""
    # Two heads share the keys and values of one, as in larger models of this family.
    config = LlamaConfig(
        vocab_size=257,
        max_position_embeddings=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=256,
        eos_token_id=256,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    return seeded(config), byte_tokenizer()


LOADERS = {
    "tiny-gpt2": Loader(tiny_gpt2, "GPT-2-like: 2 blocks of width 16."),
    "tiny-llama": Loader(tiny_llama, "Llama-like: 2 blocks of width 16, grouped-query attention."),
}
