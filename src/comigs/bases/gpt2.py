"""This base is the GPT-2 family: GPT-2 in all sizes, DistilGPT-2, and our own mini."""

from comigs.bases.base import Architecture

ARCHITECTURE = Architecture(
    model_types=("gpt2",),
    blocks="transformer.h",
    mlp="mlp",
    up="c_fc",
    gate=None,
    down="c_proj",
    activation="act",
    attention={"c_attn": "attn.c_attn", "c_proj": "attn.c_proj"},
    lr=2e-3,
)
