#!/usr/bin/env bash
# peft + transformers: a Mixtral adapter with rsLoRA is loaded with its gate and up projections
# sqrt(2) too strong.
#
# Expected: a PEFT folder means the same model as when it was written: W + alpha / sqrt(r) * B A
#           with use_rslora.
# Happens:  transformers 5 keeps w1 and w3 of all experts as one fused tensor, so peft rewrites the
#           folder's per-expert LoRA on loading: two of rank r become one of rank 2 r, with 2 alpha.
#           That keeps alpha / r as it was, but alpha / sqrt(r) grows by sqrt(2). w2 is right, and
#           so is all of it without rsLoRA. What is saved afterwards has the wrong strength in it.
#           peft only warns that the new rank and alpha "were ignored"; they are in use, and the
#           warning comes with plain LoRA too.
# Matters:  per-expert adapters are how mixtures travel between PEFT users, and the model still
#           talks sense. With use_rslora, multiply the scale into B and store the folder as plain
#           LoRA with alpha = r.
#
# Seen 2026-11 with peft 0.21.2, transformers 5.23.0, torch 2.13.0+cpu; strength against the
# folder's own formula:
#   use_rslora=False w1: scale 2.0000, meant 2.0000, 1.0000 of it
#   use_rslora=False w2: scale 2.0000, meant 2.0000, 1.0000 of it
#   use_rslora=False w3: scale 2.0000, meant 2.0000, 1.0000 of it
#   use_rslora=True  w1: scale 5.6569, meant 4.0000, 1.4142 of it
#   use_rslora=True  w2: scale 4.0000, meant 4.0000, 1.0000 of it
#   use_rslora=True  w3: scale 5.6569, meant 4.0000, 1.4142 of it
#   RuntimeWarning, each time: the rank_pattern and alpha_pattern keys of gate_up_proj "were ignored"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check \
  torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 safetensors==0.8.0 numpy==2.4.6
cd "$folder"
export HF_HOME="$folder/home" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
venv/bin/python - <<'PY'
import json
import math
import sys
import warnings
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import save_file

WIDTH, HIDDEN, EXPERTS, RANK, ALPHA = 32, 48, 2, 4, 8
SHAPES = {"w1": (HIDDEN, WIDTH), "w2": (WIDTH, HIDDEN), "w3": (HIDDEN, WIDTH)}


def base():
    """Return a tiny random Mixtral, the same at each call."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
    )
    return transformers.MixtralForCausalLM(config).eval()


def adapter(folder, use_rslora):
    """Write a PEFT folder with LoRA on every expert's linears; return every B A, unscaled."""
    torch.manual_seed(1)
    tensors, products = {}, {}
    for expert in range(EXPERTS):
        for name, (rows, columns) in SHAPES.items():
            a, b = torch.randn(RANK, columns), torch.randn(rows, RANK)
            key = f"base_model.model.model.layers.0.block_sparse_moe.experts.{expert}.{name}"
            tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
            products[expert, name] = b @ a
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "use_rslora": use_rslora,
        "target_modules": list(SHAPES),
        "base_model_name_or_path": "tiny",
    }
    Path(folder).mkdir()
    save_file(tensors, f"{folder}/adapter_model.safetensors")
    Path(folder, "adapter_config.json").write_text(json.dumps(config))
    return products


def strengths(folder, products):
    """Return the scale with which peft adds each linear's B A to the base, and its warnings."""
    before = base().model.layers[0].mlp.experts
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(base(), folder)
    said = [str(one.message) for one in caught if "ignored" in str(one.message)]
    after = model.merge_and_unload().model.layers[0].mlp.experts
    fused = (after.gate_up_proj - before.gate_up_proj).detach()
    added = {"w1": fused[:, :HIDDEN], "w3": fused[:, HIDDEN:]}
    added["w2"] = (after.down_proj - before.down_proj).detach()
    result = {}
    for name in SHAPES:
        product = torch.stack([products[expert, name] for expert in range(EXPERTS)])
        scale = float((added[name] * product).sum() / product.square().sum())
        assert torch.allclose(added[name], scale * product, atol=1e-4), "not a multiple of B A"
        result[name] = scale
    return result, said


print(
    "peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__
)
seen = {}
for use_rslora in (False, True):
    folder = f"rslora-{use_rslora}"
    products = adapter(folder, use_rslora)
    found, said = strengths(folder, products)
    meant = ALPHA / (math.sqrt(RANK) if use_rslora else RANK)
    for name, scale in found.items():
        seen[use_rslora, name] = scale / meant
        print(
            f"use_rslora={use_rslora!s:5} {name}: scale {scale:.4f}, meant {meant:.4f}, "
            f"{scale / meant:.4f} of it"
        )
    for warning in said:
        print(f"  warned: {warning}")

as_expected = all(
    abs(ratio - (math.sqrt(2) if use_rslora and name != "w2" else 1)) < 1e-3
    for (use_rslora, name), ratio in seen.items()
)
warned = len(said) == 2
sys.exit(0 if as_expected and warned else "peft behaves otherwise now")
PY
