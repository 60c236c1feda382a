#!/usr/bin/env bash
# transformers: a Llama that is moved to bfloat16 turns its heads by other angles than one that is
# loaded in bfloat16, though their state dicts are equal to the bit.
#
# Expected: `from_pretrained(folder).to(torch.bfloat16)` and `from_pretrained(folder,
#           dtype=torch.bfloat16)` are the same model: same class, same file, same numbers.
# Happens:  the frequencies of the rotary embedding are a buffer that no state dict holds. Loading
#           keeps it in float32; `.to(torch.bfloat16)` rounds it to 8 bits. The error of
#           an angle grows with the position, to whole radians after some thousand tokens. Nothing is
#           said, and a comparison of state dicts finds no difference.
# Matters:  training loops, servers and merging tools load in float32 and move. Text of 128 tokens
#           hides it; whoever then measures long windows, or compares with a tool that loaded the
#           same file in bfloat16, looks for the fault in the adapter.
#
# Seen 2026-11 with transformers 5.23.0, torch 2.13.0+cpu:
#   state dicts equal: True; frequencies torch.float32 and torch.bfloat16
#   position  128: angles off by up to 0.06 radians, cosines by up to 0.05
#   position 2000: angles off by up to 0.87 radians, cosines by up to 0.35
#   position 8000: angles off by up to 3.50 radians, cosines by up to 1.31
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

transformers.utils.logging.disable_progress_bar()
torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=64,
    hidden_size=128,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=8192,
)
transformers.LlamaForCausalLM(config).save_pretrained("model")
load = transformers.AutoModelForCausalLM.from_pretrained
loaded = load("model", dtype=torch.bfloat16)
moved = load("model", dtype=torch.float32).to(torch.bfloat16)

print("transformers", transformers.__version__, "torch", torch.__version__)
mine, other = loaded.state_dict(), moved.state_dict()
equal = mine.keys() == other.keys() and all(torch.equal(mine[k], other[k]) for k in mine)
frequencies = [model.model.rotary_emb.inv_freq for model in (loaded, moved)]
print(f"state dicts equal: {equal}; frequencies {frequencies[0].dtype} and {frequencies[1].dtype}")
cosines = {}
for position in (128, 2000, 8000):
    angles = [position * f.double() for f in frequencies]
    off = float((angles[0] - angles[1]).abs().max())
    # as the models themselves compute them, in float32
    x, ids = torch.zeros(1, 1, 128), torch.tensor([[position]])
    turns = [model.model.rotary_emb(x, ids)[0] for model in (loaded, moved)]
    cosines[position] = float((turns[0] - turns[1]).abs().max())
    print(
        f"position {position:4}: angles off by up to {off:.2f} radians, "
        f"cosines by up to {cosines[position]:.2f}"
    )
as_expected = equal and frequencies[0].dtype == torch.float32 and cosines[8000] > 0.5
sys.exit(0 if as_expected else "transformers behaves otherwise now")
PY
