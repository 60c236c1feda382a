"""A standard model as one GGUF file, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf

from comigs.bases.usable import end_ids
from comigs.errors import UserError
from comigs.personal.export.gguf_tensors import (
    INSTEAD,
    architecture_of,
    arrays,
    read_into,
)
from comigs.personal.export.gguf_text import add_tokenizer, rule_of
from comigs.text import listed

FILE_TYPES = {
    "float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0", "q5_1": "MOSTLY_Q5_1", "q5_0": "MOSTLY_Q5_0", "q4_1": "MOSTLY_Q4_1",
    "q4_0": "MOSTLY_Q4_0",
}  # fmt: skip


def the_gguf(folder: Path) -> Path:
    """Return the GGUF file of an export. Raises UserError where there is none, or another one."""
    found = sorted(path.name for path in folder.glob("*.gguf"))
    if len(found) != 1:
        held = listed(found) if found else "none"
        raise UserError(f"{folder}: must hold the export's one .gguf file, and holds {held}")
    return folder / found[0]


def require_gguf(model: Any, tokenizer: Any) -> None:
    """Raise UserError where llama.cpp cannot compute what a standard model computes."""
    config = model.config
    architecture_of(config)
    rule_of(tokenizer)
    if config.hidden_act not in ("silu", "swish"):
        raise UserError(
            f'the base\'s MLP has the activation "{config.hidden_act}", where llama.cpp has SiLU '
            f"built in; {INSTEAD}"
        )
    if config.rope_parameters["rope_type"] not in ("default", "linear", "llama3"):
        raise UserError(
            f'rope_type "{config.rope_parameters["rope_type"]}" of the base is not written as a '
            f"GGUF here; {INSTEAD}"
        )
    if getattr(config, "use_sliding_window", False):
        raise UserError(f"the base's sliding window is not written as a GGUF here; {INSTEAD}")


def write_gguf(path: Path, model: Any, tokenizer: Any, type: str, title: str) -> None:
    """Write a standard model and its tokenizer. type names what its matrices are stored as.

    Raises UserError where llama.cpp cannot compute what it computes.
    """
    require_gguf(model, tokenizer)
    writer = gguf.GGUFWriter(path, architecture_of(model.config))
    writer.add_type("model")
    writer.add_name(title)
    writer.add_file_type(getattr(gguf.LlamaFileType, FILE_TYPES[type]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_shape(writer, model)
    add_tokenizer(writer, tokenizer, model.config.vocab_size, end_ids(model, tokenizer))
    for name, numbers, kind in arrays(model, type):
        writer.add_tensor(name, numbers, raw_dtype=kind)
    finish(writer)


def finish(writer: Any) -> None:
    """Write the whole file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_shape(writer: Any, model: Any) -> None:
    """Write the keys that say how large a standard model is, and how it turns positions."""
    config = model.config
    # llama.cpp does not slide the window of these architectures, so that one window is promised.
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # The rest is the config's, under llama.cpp's names.
    writer.add_context_length(min(window, config.max_position_embeddings))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.rope_parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
    if hasattr(config, "num_experts_per_tok"):
        # The count has one name in Mixtral and Qwen3Moe, and another in Qwen2Moe.
        count = getattr(config, "num_local_experts", None) or config.num_experts
        writer.add_expert_count(count)
        writer.add_expert_used_count(config.num_experts_per_tok)
        if hasattr(config, "moe_intermediate_size"):
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        if hasattr(config, "shared_expert_intermediate_size"):
            writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def read_gguf(path: Path, model: Any) -> Any:
    """Write a file's tensors over those of a standard model of that kind, and return it."""
    read_into(model, gguf.GGUFReader(path))
    return model
