"""LoRA as a folder that PEFT loads, in the one convention that every reader gets right.

Readers differ in rsLoRA, in `alpha_pattern` and in what they make of ranks that differ. So: no
rsLoRA, no alpha pattern, `lora_alpha` equal to the largest rank r, and every scale in B. A reader
multiplies by lora_alpha / r_t for a tensor of rank r_t, so B is multiplied by r_t / r here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from comigs.bases.load import Base
from comigs.methods.lowrank import Pair
from comigs.runs.checkpoint import write_tensors

Pairs = Mapping[tuple[int, str], Pair]  # (block, site) -> A (R, in), B (out, R) with its scale
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def paths_of(base: Base) -> dict[str, str]:
    """Return every site's path inside a block: "mlp.up_proj", "self_attn.q_proj", "attn.c_proj"."""
    architecture = base.architecture
    inside = {
        site: f"{architecture.mlp}.{name}" for site, name in architecture.mlp_linears().items()
    }
    return inside | dict(architecture.attention)


def write_lora(folder: Path, base: Base, pairs: Pairs) -> None:
    """Write LoRA on these sites as a PEFT folder, in float32."""
    # The largest rank stands for all, and the others are exceptions by their path.
    folder.mkdir(parents=True, exist_ok=True)
    paths = paths_of(base)
    ranks = {paths[site]: len(A) for (_, site), (A, _) in pairs.items()}
    largest = max(ranks.values())
    # A reader multiplies by lora_alpha / r_t, which is r / r_t, so that B has the inverse of that.
    tensors: dict[str, Tensor] = {}
    for (layer, site), (A, B) in pairs.items():
        stem = stem_of(base, layer, paths[site])
        tensors[f"{stem}.lora_A.weight"] = A
        tensors[f"{stem}.lora_B.weight"] = B * (len(A) / largest)
    write_tensors(folder / WEIGHTS, tensors)
    # PEFT's own keys say the rest. Conv1D, which GPT-2 has, keeps its weights the other way round.
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.model.name_or_path or None,
        "r": largest,
        "lora_alpha": largest,
        "use_rslora": False,
        "alpha_pattern": {},
        "rank_pattern": {path: rank for path, rank in ranks.items() if rank != largest},
        "target_modules": sorted(ranks),
        "fan_in_fan_out": base.model.config.model_type == "gpt2",
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def read_lora(folder: Path, base: Base) -> dict[tuple[int, str], Pair]:
    """Read a PEFT folder of this convention: A, and B with its scale in it."""
    described = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    tensors = load_file(folder / WEIGHTS)
    found = {}
    for site, path in paths_of(base).items():
        rank = described["rank_pattern"].get(path, described["r"])
        for layer in range(base.model.config.num_hidden_layers):
            stem = stem_of(base, layer, path)
            if f"{stem}.lora_A.weight" in tensors:
                A, B = (tensors.pop(f"{stem}.lora_{side}.weight") for side in "AB")
                found[layer, site] = (A, B * (described["lora_alpha"] / rank))
    assert not tensors, f"{folder}: {sorted(tensors)} have no place"
    return found


def stem_of(base: Base, layer: int, path: str) -> str:
    """Return PEFT's name for a linear, without the side."""
    return f"base_model.model.{base.architecture.blocks}.{layer}.{path}"
