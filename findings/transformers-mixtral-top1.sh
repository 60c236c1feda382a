#!/usr/bin/env bash
# transformers: in a Mixtral with one expert per token the router's weight is always 1, and the
# router cannot learn.
#
# Expected: the chosen expert's output is multiplied by its probability, as in a Switch transformer
#           and as Mixtral does with its two; a mixture with top-1 routing can be exported as
#           Mixtral with num_experts_per_tok=1.
# Happens:  Mixtral divides the chosen weights by their sum. Of one weight that is always 1, so the
#           output is another model's, and the language-model loss gives the router a gradient of
#           rounding errors only: fine-tuned, it stays where it was. Qwen2-MoE with
#           norm_topk_prob=False keeps the probability and its gradient. No configuration of Mixtral
#           does, and nothing is said.
# Matters:  whoever exports a routed mixture of LoRA experts as a standard model reaches for Mixtral
#           first; with top-1 it loads, talks, and is wrong. The auxiliary loss is then all that a
#           router would be trained by.
#
# Seen 2026-11 with transformers 5.23.0, torch 2.13.0+cpu:
#   Mixtral  1 of 4 experts: router weights 1.000 to 1.000, gradient 1.0e-08 of the experts'
#   Qwen2Moe 1 of 4 experts: router weights 0.318 to 0.708, gradient 8.9e-01 of the experts'
#   Mixtral  2 of 4 experts: router weights 0.103 to 0.897, gradient 4.3e-01 of the experts'
#   Qwen2Moe 2 of 4 experts: router weights 0.132 to 0.708, gradient 6.5e-01 of the experts'
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check \
  torch==2.13.0 transformers==5.23.0 safetensors==0.8.0 numpy==2.4.6
cd "$folder"
export HF_HOME="$folder/home" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
venv/bin/python - <<'PY'
import sys

import torch
import transformers

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def models(used):
    """Return the two families with `used` of four experts for each token."""
    torch.manual_seed(0)
    mixtral = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            **SIZES, num_local_experts=4, num_experts_per_tok=used, initializer_range=0.2
        )
    )
    qwen = transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(
            **SIZES,
            num_experts=4,
            num_experts_per_tok=used,
            moe_intermediate_size=48,
            shared_expert_intermediate_size=1,
            norm_topk_prob=False,
            initializer_range=0.2,
        )
    )
    return {"Mixtral": mixtral, "Qwen2Moe": qwen}


def weights(model, tokens):
    """Return the weights by which the first layer's chosen experts are multiplied."""
    kept = []
    gate = model.model.layers[0].mlp.gate
    handle = gate.register_forward_hook(lambda module, inputs, output: kept.append(output))
    model(tokens)
    handle.remove()
    logits, chosen_weights, chosen = kept[0]
    return chosen_weights.detach()


def gradient(model, tokens):
    """Return the router gradient's norm in the first layer, over that of the experts."""
    model(tokens, labels=tokens).loss.backward()
    layer = model.model.layers[0].mlp
    return float(layer.gate.weight.grad.norm() / layer.experts.down_proj.grad.norm())


print("transformers", transformers.__version__, "torch", torch.__version__)
tokens = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))
seen = {}
for used in (1, 2):
    for family, model in models(used).items():
        low, high = (float(bound) for bound in weights(model, tokens).aminmax())
        seen[family, used] = (low, high, gradient(model, tokens))
        print(
            f"{family:8} {used} of 4 experts: router weights {low:.3f} to {high:.3f}, "
            f"gradient {seen[family, used][2]:.1e} of the experts'"
        )

low, high, share = seen.pop(("Mixtral", 1))
as_expected = low > 0.9999 and high < 1.0001 and share < 1e-5
as_expected &= all(low < 0.9 and share > 1e-2 for low, high, share in seen.values())
sys.exit(0 if as_expected else "transformers behaves otherwise now")
PY
