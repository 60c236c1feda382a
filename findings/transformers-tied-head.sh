#!/usr/bin/env bash
# transformers: a checkpoint with a head of its own, whose config says that embedding and head are
# tied, is read as two different models by two usual ways, and the strict one loses a tensor.
#
# Expected: either the config decides or the file does, for every way to load; and
#           `load_state_dict(strict=True)` that reports all keys as matched has put each tensor of
#           the file into the model.
# Happens:  `from_pretrained` sees that both tensors are there and differ, warns, and does not tie
#           them, but leaves `tie_word_embeddings = True` in the config. A model made from that
#           config ties them: both tensors of the file go into one parameter, the head comes last,
#           and the embedding is silently the head's. Keys match and strict is content.
# Matters:  full fine-tuning and vocabulary pruning leave such checkpoints. Frameworks that build from
#           the config and load strictly (distributed training, quantisers, exporters) get another
#           model than the one that was evaluated.
#
# Seen 2026-11 with transformers 5.23.0, torch 2.13.0+cpu:
#   from_pretrained: tied False, config says True, each tensor as in the file: True
#   from_config and load_state_dict(strict=True): <All keys matched successfully>
#   its embedding is the file's: False; is the file's head: True; logits off by up to 0.88
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
from safetensors.torch import load_file

transformers.utils.logging.disable_progress_bar()
torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
model = transformers.LlamaForCausalLM(config)
model.config.tie_word_embeddings = True
model.save_pretrained("model")
tensors = load_file("model/model.safetensors")
embedding, head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]

print("transformers", transformers.__version__, "torch", torch.__version__)
loaded = transformers.AutoModelForCausalLM.from_pretrained("model")
tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
whole = torch.equal(loaded.model.embed_tokens.weight, embedding)
whole &= torch.equal(loaded.lm_head.weight, head)
says = loaded.config.tie_word_embeddings
print(f"from_pretrained: tied {tied}, config says {says}, each tensor as in the file: {whole}")

built = transformers.AutoModelForCausalLM.from_config(loaded.config)
print("from_config and load_state_dict(strict=True):", built.load_state_dict(tensors, strict=True))
kept = torch.equal(built.model.embed_tokens.weight, embedding)
replaced = torch.equal(built.model.embed_tokens.weight, head)
tokens = torch.arange(16)[None]
with torch.no_grad():
    off = float((loaded(tokens).logits - built(tokens).logits).abs().max())
print(
    f"its embedding is the file's: {kept}; is the file's head: {replaced}; "
    f"logits off by up to {off:.2f}"
)
as_expected = not tied and says and whole and replaced and not kept and off > 0.1
sys.exit(0 if as_expected else "transformers behaves otherwise now")
PY
