"""Which tensor of a GGUF is which tensor of a standard model, and how its numbers are stored.

llama.cpp's architecture "llama" rotates neighbouring dimensions of q and k, transformers the first
half with the second, so their rows change places. Its mixtures of experts renormalise the K
weights or do not, as is built into each architecture: "llama" and "qwen3moe" do, "qwen2moe" does
not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from comigs.errors import UserError

Array = NDArray[Any]
TYPES = {
    "float32": gguf.GGMLQuantizationType.F32, "float16": gguf.GGMLQuantizationType.F16,
    "bfloat16": gguf.GGMLQuantizationType.BF16, "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q5_1": gguf.GGMLQuantizationType.Q5_1, "q5_0": gguf.GGMLQuantizationType.Q5_0,
    "q4_1": gguf.GGMLQuantizationType.Q4_1, "q4_0": gguf.GGMLQuantizationType.Q4_0,
}  # fmt: skip
BLOCK = 32  # numbers that share a scale in all quantised types above
INSTEAD = 'what does work: "transformers", "peft" and "flat"'


@dataclass(frozen=True)
class Place:
    """A place says where a tensor of a GGUF is in a standard model.

    name is the GGUF's. source is the model's, of which it is the rows `rows` of every expert where
    those are given. heads is how many heads its rows are, where they change places, else None.
    """

    name: str
    source: str
    rows: slice | None = None
    heads: int | None = None

    def of(self, state: dict[str, Tensor]) -> Tensor:
        """Return the tensor as llama.cpp wants it."""
        tensor = self.part(state)
        return tensor if self.heads is None else to_pairs(tensor, self.heads)

    def put(self, state: dict[str, Tensor], tensor: Tensor) -> None:
        """Write a tensor of llama.cpp's back to where it is from."""
        back = tensor if self.heads is None else to_halves(tensor, self.heads)
        self.part(state).copy_(back.reshape(self.part(state).shape))

    def part(self, state: dict[str, Tensor]) -> Tensor:
        """Return a view of the model's tensor, or of these rows of it."""
        return state[self.source] if self.rows is None else state[self.source][:, self.rows]


def to_pairs(rows: Tensor, heads: int) -> Tensor:
    """Return rows of q or k from [first halves, second halves] of each head to pairs of both."""
    pairs: Tensor = rows.unflatten(0, (heads, 2, -1)).transpose(1, 2)
    return pairs.reshape(rows.shape)


def to_halves(rows: Tensor, heads: int) -> Tensor:
    """Return the inverse of `to_pairs`."""
    halves: Tensor = rows.unflatten(0, (heads, -1, 2)).transpose(1, 2)
    return halves.reshape(rows.shape)


def architecture_of(config: Any) -> str:
    """Return llama.cpp's name for a standard model's architecture. Raises UserError for none."""
    # Whether K weights are made to sum to 1 is built into each of llama.cpp's architectures.
    kind = config.model_type
    renormalised = getattr(config, "norm_topk_prob", True)
    if kind == "qwen3_moe" and not renormalised:
        raise UserError(
            "top_k = 1 on a Qwen3 base: llama.cpp makes its only weight 1 where ours keeps the "
            f"probability; {INSTEAD}"
        )
    if kind == "qwen2_moe" and renormalised:
        return "llama"
    known = {
        "llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2",
        "qwen3": "qwen3", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe",
    }  # fmt: skip
    if kind not in known:
        raise UserError(
            f'the family "{kind}" is not written as a GGUF here; {INSTEAD} (llama.cpp\'s own '
            "converter may read what they write)"
        )
    return known[kind]


def places(model: Any) -> list[Place]:
    """Return every tensor that a standard model's GGUF has, and where it is from."""
    # gguf knows llama.cpp's names for transformers' own, but not for experts that are one tensor.
    config = model.config
    architecture = architecture_of(config)
    names = gguf.get_tensor_name_map(_enum(architecture), config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    found = []
    # A tied head is not stored, except in Qwen2Moe, which llama.cpp does not tie.
    for source in model.state_dict():
        stem, _, kind = source.rpartition(".")
        if source == "lm_head.weight" and config.tie_word_embeddings and architecture != "qwen2moe":
            continue
        if "shared_expert" in source and architecture == "llama":
            continue  # it is zero, and only Qwen2Moe has a place for it
        if stem.endswith(".mlp.experts"):
            block = f"blk.{source.split('.')[2]}"
            found += _experts(block, source, config)
            continue
        name = names.get_name(stem)
        assert name is not None, f"{source} has no place in a GGUF"
        rows = heads.get(stem.rpartition(".")[2]) if architecture == "llama" else None
        found.append(Place(f"{name}.{kind}", source, heads=rows))
    return found


def _experts(block: str, source: str, config: Any) -> list[Place]:
    """Return the places of one tensor of all experts: gate and up are one in transformers."""
    if source.endswith("down_proj"):
        return [Place(f"{block}.ffn_down_exps.weight", source)]
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    return [
        Place(f"{block}.ffn_gate_exps.weight", source, slice(0, width)),
        Place(f"{block}.ffn_up_exps.weight", source, slice(width, 2 * width)),
    ]


def _enum(architecture: str) -> Any:
    """Return gguf's number of an architecture."""
    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    return known[architecture]


def stored_as(name: str, tensor: Tensor, type: str) -> Any:
    """Return a tensor's type. Vectors and routers stay float32, what rounds badly is wider."""
    if tensor.dim() < 2 or "ffn_gate_inp" in name:
        return TYPES["float32"]
    wanted = TYPES[type]
    if type in ("float32", "float16", "bfloat16"):
        return wanted
    if tensor.shape[-1] % BLOCK:
        return TYPES["float16"]
    # In 4 bits an embedding that is the head as well costs as much as all the rest.
    if name in ("token_embd.weight", "output.weight"):
        return TYPES["q8_0"]
    return wanted


def arrays(model: Any, type: str) -> Iterator[tuple[str, Array, Any]]:
    """Return name, numbers and type of every tensor of a standard model's GGUF."""
    state = model.state_dict()
    for place in places(model):
        tensor = place.of(state).float().contiguous()
        if "ffn_gate_inp_shexp" in place.name:
            # llama.cpp computes sigmoid(g) as silu(g) / g, which is no number for 0. What this
            # weighs is zero, so that any other g does.
            tensor = torch.ones_like(tensor)
        kind = stored_as(place.name, tensor, type)
        yield place.name, gguf.quants.quantize(tensor.numpy(), kind), kind
    if (factors := rope_factors(model)) is not None:
        yield "rope_freqs.weight", factors.numpy(), TYPES["float32"]


def rope_factors(model: Any) -> Tensor | None:
    """Return what Llama 3's scaling divides each frequency by; None without that scaling."""
    config = model.config
    if config.rope_parameters["rope_type"] != "llama3":
        return None
    # transformers has computed the scaled frequencies: the factor is what they were, over them.
    scaled = model.model.rotary_emb.inv_freq.double()
    exponents = torch.arange(len(scaled), dtype=torch.float64) / len(scaled)
    plain = 1.0 / config.rope_parameters["rope_theta"] ** exponents
    factors: Tensor = plain / scaled
    return factors.float()


def read_into(model: Any, reader: Any) -> None:
    """Write every tensor of a GGUF over a standard model's own, as float32."""
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    state = model.state_dict()
    for place in places(model):
        found = by_name[place.name]
        numbers = gguf.quants.dequantize(found.data, found.tensor_type)
        tensor = torch.from_numpy(np.array(numbers, dtype=np.float32))
        if "ffn_gate_inp_shexp" not in place.name:
            place.put(state, tensor)
