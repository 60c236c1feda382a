#!/usr/bin/env bash
# llama.cpp: a Qwen2-MoE whose shared expert is switched off by zeros answers NaN, and says nothing.
#
# Expected: a shared expert of zero weights adds 0, whatever its gate says; sigmoid(0) is 1/2.
# Happens:  llama.cpp computes the gate's sigmoid as silu(g) / g. A gate of zero weights makes that
#           0 / 0, and every logit of every token is NaN. No error: the server answers, with text,
#           and null in place of log probabilities. The same file with a gate of 0.001 agrees with
#           the formula (numpy, below).
# Matters:  Qwen2-MoE is an architecture that does not renormalise its router weights, so that a
#           mixture of LoRA experts with top-1 routing is exported as one. It has no shared expert
#           of its own, the architecture demands one, and zeros are the obvious filler. Fill the
#           gate with ones: 0 times 1/2 to 1 is still 0.
#
# Seen 2026-11 with xllamacpp 2026.10.11549 (llama.cpp), gguf 0.19.0, numpy 2.4.6:
#   gate   0.0: 98 of 98 log probabilities are NaN, the rest at most 0.0e+00 off
#   gate 0.001: 0 of 98 log probabilities are NaN, the rest at most 1.7e-03 off
#   gate   1.0: 0 of 98 log probabilities are NaN, the rest at most 1.7e-03 off
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check \
  xllamacpp==2026.10.11549 gguf==0.19.0 numpy==2.4.6
cd "$folder"
timeout 300 venv/bin/python - 2>log <<'PY' || { tail -n 1 log; exit 1; }
import sys
from importlib.metadata import version

import gguf
import numpy as np
import xllamacpp

WIDTH, HIDDEN, HEADS, EXPERTS, USED = 64, 96, 4, 4, 1
# Printable ASCII, the byte vocabulary's space and line feed, one merge (it must have one), an end.
TOKENS = [chr(code) for code in range(33, 127)] + ["\u0120", "\u010a", "ab", "<end>"]


def weights(gate):
    """Return a random model of one layer with a zero shared expert and this weight in its gate."""
    random = np.random.default_rng(0)

    def normal(*shape):
        return random.standard_normal(shape) * 0.3

    layer = {
        "attn_norm.weight": np.ones(WIDTH),
        "attn_output.weight": normal(WIDTH, WIDTH),
        "ffn_norm.weight": np.ones(WIDTH),
        "ffn_gate_inp.weight": normal(EXPERTS, WIDTH),
        "ffn_gate_exps.weight": normal(EXPERTS, HIDDEN, WIDTH),
        "ffn_up_exps.weight": normal(EXPERTS, HIDDEN, WIDTH),
        "ffn_down_exps.weight": normal(EXPERTS, WIDTH, HIDDEN),
        "ffn_gate_inp_shexp.weight": np.full(WIDTH, gate),
        "ffn_gate_shexp.weight": np.zeros((HIDDEN, WIDTH)),
        "ffn_up_shexp.weight": np.zeros((HIDDEN, WIDTH)),
        "ffn_down_shexp.weight": np.zeros((WIDTH, HIDDEN)),
    }
    for name in "qkv":
        layer[f"attn_{name}.weight"] = normal(WIDTH, WIDTH)
        layer[f"attn_{name}.bias"] = np.zeros(WIDTH)
    model = {f"blk.0.{name}": value for name, value in layer.items()}
    model["token_embd.weight"] = normal(len(TOKENS), WIDTH)
    model["output.weight"] = normal(len(TOKENS), WIDTH)
    model["output_norm.weight"] = np.ones(WIDTH)
    return {name: value.astype(np.float32) for name, value in model.items()}


def write(path, tensors):
    """Write the model as a GGUF of architecture qwen2moe."""
    file = gguf.GGUFWriter(path, "qwen2moe")
    file.add_context_length(64)
    file.add_embedding_length(WIDTH)
    file.add_block_count(1)
    file.add_feed_forward_length(HIDDEN)
    file.add_expert_feed_forward_length(HIDDEN)
    file.add_expert_shared_feed_forward_length(HIDDEN)
    file.add_expert_count(EXPERTS)
    file.add_expert_used_count(USED)
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
    for name, value in tensors.items():
        file.add_tensor(name, value)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def llama_cpp(path, token):
    """Return llama.cpp's log probabilities after this one token, NaN where it says none."""
    settings = xllamacpp.CommonParams()
    settings.model.path = path
    settings.n_ctx = 64
    settings.n_parallel = 1
    settings.cpuparams.n_threads = 1
    server = xllamacpp.Server(settings)
    answer = server.handle_completions(
        {"prompt": [token], "max_tokens": 1, "logprobs": len(TOKENS)}
    )
    result = np.full(len(TOKENS), np.nan)
    for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        result[entry["id"]] = np.nan if entry["logprob"] is None else entry["logprob"]
    return result


def by_hand(tensors, token):
    """Return the same in numpy; at the first position attention is the value itself."""

    def norm(x):
        return x / np.sqrt((x * x).mean() + 1e-6)

    t = {name.removeprefix("blk.0."): value.astype(np.float64) for name, value in tensors.items()}
    x = t["token_embd.weight"][token]
    x = x + t["attn_output.weight"] @ (t["attn_v.weight"] @ norm(x))
    h = norm(x)
    router = np.exp(t["ffn_gate_inp.weight"] @ h)
    router /= router.sum()
    best = int(router.argmax())
    gate = t["ffn_gate_exps.weight"][best] @ h
    hidden = gate / (1 + np.exp(-gate)) * (t["ffn_up_exps.weight"][best] @ h)
    x = x + router[best] * (t["ffn_down_exps.weight"][best] @ hidden)
    logits = t["output.weight"] @ norm(x)
    return logits - np.log(np.exp(logits).sum())


print("xllamacpp", version("xllamacpp"), "gguf", version("gguf"), "numpy", np.__version__)
seen = {}
for gate in (0.0, 0.001, 1.0):
    tensors = weights(gate)
    write(f"{gate}.gguf", tensors)
    got, wanted = llama_cpp(f"{gate}.gguf", token=5), by_hand(tensors, token=5)
    seen[gate] = (int(np.isnan(got).sum()), float(np.nanmax(np.abs(got - wanted), initial=0)))
    missing, off = seen[gate]
    print(
        f"gate {gate:5}: {missing} of {len(TOKENS)} log probabilities are NaN, "
        f"the rest at most {off:.1e} off"
    )

as_expected = seen[0.0][0] == len(TOKENS) and all(
    seen[gate][0] == 0 and seen[gate][1] < 1e-2 for gate in (0.001, 1.0)
)
sys.exit(0 if as_expected else "llama.cpp behaves otherwise now")
PY
