"""This base is Llama-like models: Llama 3.x, SmolLM2, Mistral, Qwen2/2.5/3, Gemma 3 (text)."""

from comigs.bases.base import Architecture

ARCHITECTURE = Architecture(
    model_types=("llama", "mistral", "qwen2", "qwen3", "gemma3_text"),
    blocks="model.layers",
    mlp="mlp",
    up="up_proj",
    gate="gate_proj",
    down="down_proj",
    activation="act_fn",
    attention={
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
    },
    lr=2e-4,
)
