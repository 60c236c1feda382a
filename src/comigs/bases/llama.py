"""This base is Llama-like models, whose MLP is `down(act(gate(x)) * up(x))`, three linears.

What stands around the MLP, as norms after it, caps and multipliers, is the model's own and stays so
(docs/bases.md).
"""

from comigs.bases.base import Architecture

ARCHITECTURE = Architecture(
    model_types=(
        "llama",
        "mistral",
        "ministral",
        "ministral3",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "smollm3",
        "olmo",
        "olmo2",
        "olmo3",
        "granite",
    ),
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
