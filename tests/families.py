"""A small model of every family, with all that its config class can put around an MLP: norms after
it, caps, multipliers, layers without positions, and windows that slide.
"""

from __future__ import annotations

import copy

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    Ministral3Config,
    MinistralConfig,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from comigs.bases.tiny import byte_tokenizer

SMALL = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
MIXED = ["sliding_attention", "full_attention"]
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 2.0,
    "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 0.1,
}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, mlp_bias=True, attention_bias=True),
    "mistral": MistralConfig(**SMALL, head_dim=8),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
    "gemma3_text": Gemma3TextConfig(
        **SMALL, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=0.5
    ),
    "ministral": MinistralConfig(**SMALL, head_dim=8, sliding_window=8, layer_types=MIXED),
    "ministral3": Ministral3Config(**SMALL, head_dim=8, rope_parameters=YARN),
    "gemma": GemmaConfig(**SMALL, head_dim=8),
    "gemma2": Gemma2Config(
        **SMALL,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=8,
        attn_logit_softcapping=0.5,
        final_logit_softcapping=0.5,
    ),
    "smollm3": SmolLM3Config(**SMALL, no_rope_layers=[1, 0]),
    "olmo": OlmoConfig(**SMALL, clip_qkv=0.3),
    "olmo2": Olmo2Config(**SMALL),
    "olmo3": Olmo3Config(**SMALL, sliding_window=8, layer_types=MIXED),
    "granite": GraniteConfig(
        **SMALL,
        embedding_multiplier=3.0,
        logits_scaling=0.5,
        residual_multiplier=0.7,
        attention_multiplier=0.3,
        mlp_bias=True,
    ),
    "gpt2": GPT2Config(
        vocab_size=97,
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=1,
    ),
}


def randomised(model):
    """Biases and norms start as zeros and ones, which would hide how they are used."""
    random = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=random)
    return model.requires_grad_(False).eval()


def built(model_type):
    return built_from(CONFIGS[model_type])


def built_from(config):
    torch.manual_seed(0)
    return randomised(AutoModelForCausalLM.from_config(config))


def saved(model_type, folder):
    """A folder of that family as `save_pretrained` writes it, with a token for every byte."""
    config = copy.deepcopy(CONFIGS[model_type])
    config.vocab_size, config.bos_token_id, config.eos_token_id = 257, 256, 256
    torch.manual_seed(0)
    model = randomised(AutoModelForCausalLM.from_config(config))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
