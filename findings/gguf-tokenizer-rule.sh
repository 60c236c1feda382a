#!/usr/bin/env bash
# transformers: a tokenizer read from a GGUF splits text by another rule than the one that the file
# names.
#
# Expected: AutoTokenizer.from_pretrained(folder, gguf_file=...) gives the ids that llama.cpp gives
#           for the same file, or it refuses a rule (tokenizer.ggml.pre) that it does not know.
# Happens:  in a file of architecture llama it knows some rules and takes GPT-2's for any other, in
#           silence: smollm, command-r, starcoder, deepseek-llm and more. Those give every digit a
#           token, or keep spaces off digits; GPT-2's does neither. Text without digits comes out
#           alike, so a short test finds nothing.
# Matters:  a model that is fine-tuned on a GGUF base learns one split of numbers and dates, and
#           llama.cpp, which serves it, feeds it another; save_pretrained makes the wrong rule
#           permanent. Compare ids on text with numbers and double spaces, or take the tokenizer
#           from its own repository.
#
# Seen 2026-11 with transformers 5.23.0, tokenizers 0.23.3, xllamacpp 2026.10.11549 (llama.cpp),
# gguf 0.19.0, on the text "ab  12" (the vocabulary's space is written _):
#   gpt-2         llama.cpp ab _ _ 12      transformers ab _ _ 12
#   llama-bpe     llama.cpp ab _ _ 12      transformers ab _ _ 12
#   qwen2         llama.cpp ab _ _ 1 2     transformers ab _ _ 1 2
#   smollm        llama.cpp ab __ 1 2      transformers ab _ _ 12
#   command-r     llama.cpp ab __ 1 2      transformers ab _ _ 12
#   starcoder     llama.cpp ab __ 1 2      transformers ab _ _ 12
#   deepseek-llm  llama.cpp ab __ 12       transformers ab _ _ 12
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check \
  torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3 numpy==2.4.6 \
  gguf==0.19.0 xllamacpp==2026.10.11549
cd "$folder"
export HF_HOME="$folder/home" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
timeout 300 venv/bin/python - 2>log <<'PY' || { tail -n 1 log; exit 1; }
import json
import sys
import urllib.request
from importlib.metadata import version

import gguf
import numpy as np
import tokenizers
import transformers
import xllamacpp

WIDTH, HIDDEN, HEADS = 32, 48, 4
MERGES = ["\u0120 \u0120", "a b", "1 2"]
# Printable ASCII, the byte vocabulary's space and line feed, what the merges make, an end.
TOKENS = [chr(code) for code in range(33, 127)] + ["\u0120", "\u010a"]
TOKENS += [merge.replace(" ", "") for merge in MERGES] + ["<end>"]
TEXT = "ab  12"


def write(path, rule):
    """Write a tiny random Llama whose tokenizer names this rule."""
    random = np.random.default_rng(0)
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
    file.add_tokenizer_pre(rule)
    file.add_token_list(TOKENS)
    file.add_token_types([1] * (len(TOKENS) - 1) + [3])
    file.add_token_merges(MERGES)
    file.add_eos_token_id(len(TOKENS) - 1)
    file.add_add_bos_token(False)
    shapes = {
        "token_embd": (len(TOKENS), WIDTH),
        "output": (len(TOKENS), WIDTH),
        "output_norm": (WIDTH,),
    }
    shapes |= {f"blk.0.{name}_norm": (WIDTH,) for name in ("attn", "ffn")}
    shapes |= {f"blk.0.attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.ffn_{name}": (HIDDEN, WIDTH) for name in ("gate", "up")}
    shapes["blk.0.ffn_down"] = (WIDTH, HIDDEN)
    for name, shape in shapes.items():
        file.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def llama_cpp(path):
    """Return the ids that llama.cpp's server gives for the text."""
    settings = xllamacpp.CommonParams()
    settings.model.path = path
    settings.n_ctx = 64
    settings.n_parallel = 1
    settings.cpuparams.n_threads = 1
    server = xllamacpp.Server(settings)
    server.handle_completions(
        {"prompt": [0], "max_tokens": 1}
    )  # a server that did nothing may not end
    request = urllib.request.Request(
        f"{server.listening_address}/tokenize",
        json.dumps({"content": TEXT}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["tokens"]


def shown(ids):
    """Return the tokens with a _ for the vocabulary's space."""
    return [TOKENS[token].replace("\u0120", "_") for token in ids]


print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
print("xllamacpp", version("xllamacpp"), "gguf", version("gguf"), flush=True)
seen = {}
for rule in ("gpt-2", "llama-bpe", "qwen2", "smollm", "command-r", "starcoder", "deepseek-llm"):
    path = f"{rule}.gguf"
    write(path, rule)
    tokenizer = transformers.AutoTokenizer.from_pretrained(".", gguf_file=path)
    seen[rule] = (shown(llama_cpp(path)), shown(tokenizer(TEXT)["input_ids"]))
    print(
        f"{rule:13} llama.cpp {' '.join(seen[rule][0]):14} transformers {' '.join(seen[rule][1])}",
        flush=True,
    )

alike = {rule for rule, (one, other) in seen.items() if one == other}
gpt2 = all(other == seen["gpt-2"][0] for rule, (_, other) in seen.items() if rule not in alike)
as_expected = gpt2 and alike == {"gpt-2", "llama-bpe", "qwen2"}
sys.exit(0 if as_expected else "transformers behaves otherwise now")
PY
