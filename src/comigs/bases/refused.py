"""This module says of well-known families why no experts are put on them."""

from comigs.errors import UserError

MIXTURE = (
    "is a mixture of experts already, whose MLPs have a router of their own; give a dense model"
)
RECURRENT = (
    "has blocks without attention, on which nothing here was tried; give a plain transformer"
)
TOGETHER = "reads images or sound, too; give its text model alone"
FUSED = (
    "keeps gate and up of its MLP in one linear (gate_up_proj), where experts have a LoRA on each; "
    "give a family with two"
)
ENCODER = "is no decoder of text alone; give a causal language model"

REFUSED: dict[str, str] = {
    **dict.fromkeys(
        (
            "mixtral",
            "qwen2_moe",
            "qwen3_moe",
            "deepseek_v2",
            "deepseek_v3",
            "gpt_oss",
            "granitemoe",
            "olmoe",
            "phimoe",
        ),
        MIXTURE,
    ),
    **dict.fromkeys(
        ("mamba", "mamba2", "rwkv", "recurrent_gemma", "falcon_h1", "qwen3_5_text", "lfm2"),
        RECURRENT,
    ),
    **dict.fromkeys(
        ("gemma3", "gemma3n", "gemma4", "mistral3", "llama4", "qwen3_5", "phi4_multimodal"),
        TOGETHER,
    ),
    **dict.fromkeys(("phi3", "glm", "glm4"), FUSED),
    **dict.fromkeys(("bert", "roberta", "t5", "bart"), ENCODER),
}


def require_no_refused(model_type: str) -> None:
    """Raise UserError for a family that no experts can be put on, before its weights are read."""
    if model_type in REFUSED:
        raise UserError(f'base: the model family "{model_type}" {REFUSED[model_type]}')
