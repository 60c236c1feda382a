"""Reads the golden files: the authors' GPT-2 mixture as a `transformers` model plus our slots."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from comigs.bases.gpt2 import ARCHITECTURE
from comigs.config import ExpertsSection
from comigs.experts.attach import Attachment
from comigs.slots import Slot

FOLDER = Path(__file__).parent
SITES = {"c_fc": "up", "c_proj": "down"}


def read(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def base_model(tensors: dict[str, Tensor]) -> Any:
    """Our own `transformers` GPT-2 with the golden base weights: (out, in) there, (in, out) in
    Conv1D.
    """
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=256,
            n_positions=64,
            n_embd=32,
            n_layer=2,
            n_head=2,
            activation_function="gelu_new",
        )
    )
    state = {}
    for key, value in tensors.items():
        if not key.startswith("base."):
            continue
        name = re.sub(r"mlp\.experts\.\d+\.", "mlp.", key.removeprefix("base."))
        is_linear = name.endswith("weight") and any(
            part in name for part in ("c_attn", "c_proj", "c_fc")
        )
        state[name] = value.T.contiguous() if is_linear else value
    state["lm_head.weight"] = state["transformer.wte.weight"]
    model.load_state_dict(state)
    return model.requires_grad_(False).eval()


def slots(tensors: dict[str, Tensor], prefix: str = "") -> dict[Slot, Tensor]:
    """Golden names -> slots. Expert 0 is the generalist, the others are specialists."""
    found = {}
    for key, value in tensors.items():
        if not key.startswith(prefix):
            continue
        name = key.removeprefix(prefix)
        if m := re.search(r"h\.(\d+)\.mlp\.experts\.(\d+)\.(c_fc|c_proj)\.lora_([AB])$", name):
            layer, expert = int(m[1]), int(m[2])
            found[Slot(layer, SITES[m[3]], "g0" if expert == 0 else f"s{expert - 1}", m[4])] = value
        elif m := re.search(r"h\.(\d+)\.attn\.(c_attn|c_proj)\.lora_([AB])$", name):
            found[Slot(int(m[1]), m[2], "attention", m[3])] = value
        elif m := re.search(r"h\.(\d+)\.mlp\.per_token_router\.weight$", name):
            found[Slot(int(m[1]), "mlp", "router", "W")] = value
    return found


def attached(
    tensors: dict[str, Tensor], top_k: int, dtype: torch.dtype = torch.float32
) -> Attachment:
    return Attachment(
        base_model(tensors).to(dtype), ARCHITECTURE, ExpertsSection(top_k=top_k, strength="each")
    )


def config_of(metadata: dict[str, str]) -> dict[str, Any]:
    return json.loads(metadata["config"])  # type: ignore[no-any-return]
