#!/usr/bin/env bash
# opacus + transformers: a text's "per-sample" gradient depends on how long its neighbours are.
#
# Expected: the gradient that opacus gives for a text is the same whatever else is in the batch, so
#           that one text more or less changes the sum of clipped gradients by at most the clip.
# Happens:  with `labels` a transformers model returns the mean over all *tokens* of the batch, and
#           opacus takes that for a mean over texts and multiplies by their number. A text's
#           gradient comes out n * (its tokens / all tokens) times what it is alone: larger beside
#           shorter texts, smaller beside longer ones. Nothing warns, and in batches of equal
#           lengths all is right.
# Matters:  the accountant's epsilon rests on that "at most the clip". Here one long text that is
#           left out moves the sum by 1.37 times the clip. Take each text's own mean first, and the
#           sum of those as the loss.
#
# Seen 2026-11 with opacus 1.6.0, transformers 5.23.0, peft 0.21.2, torch 2.13.0+cpu; the norm of
# one text's gradient over what it is alone, and how far one text of 30 tokens more moves the sum of
# eight clipped gradients of texts of 4 tokens, in clips (none is longer than the clip alone):
#   beside itself: 1.000, beside 4 tokens: 1.500, beside 30 tokens: 0.474
#   the model's own loss: 1.37 clips, the sum of each text's mean: 0.23 clips
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check \
  torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 safetensors==0.8.0 \
  numpy==2.4.6 opacus==1.6.0
cd "$folder"
export HF_HOME="$folder/home" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
venv/bin/python -W ignore - <<'PY'
import sys

import opacus
import peft
import torch
import transformers
from torch.nn.functional import cross_entropy

IGNORED = -100


def wrapped(loss_reduction):
    """Return a tiny Llama with LoRA, the same at each call, that keeps per-sample gradients."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",
    )
    lora = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["up_proj"], init_lora_weights=False)
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config).train(), lora)
    return opacus.GradSampleModule(model, loss_reduction=loss_reduction, strict=False)


def gradients(texts, own_means=False):
    """Return each text's gradient (texts, parameters), by the model's own loss or by own_means."""
    longest = max(map(len, texts))
    ids = torch.zeros(len(texts), longest, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = labels[row, : len(text)] = text
    model = wrapped("sum" if own_means else "mean")
    result = model(
        input_ids=ids,
        labels=labels,
        attention_mask=(labels != IGNORED).long(),
        position_ids=torch.arange(longest).expand_as(ids),
    )
    loss = result.loss
    if own_means:
        loss = sum(
            cross_entropy(logits[:-1], label[1:], ignore_index=IGNORED)
            for logits, label in zip(result.logits, labels)
        )
    loss.backward()
    learnt = [p.grad_sample.flatten(1) for p in model.parameters() if p.requires_grad]
    return torch.cat(learnt, dim=1)


def clipped_sum(texts, clip, own_means):
    """Return the sum of the texts' gradients, each no longer than the clip."""
    found = gradients(texts, own_means)
    return (found * (clip / found.norm(dim=1, keepdim=True)).clamp(max=1)).sum(0)


print(
    "opacus", opacus.__version__, "transformers", transformers.__version__,
    "peft", peft.__version__, "torch", torch.__version__,
)
random = torch.Generator().manual_seed(1)
text, short, long = (torch.randint(1, 64, (n,), generator=random) for n in (10, 4, 30))

# One text alone, and beside others.
alone = gradients([text])[0].norm()
ratios = {}
for name, other in (("itself", text), ("4 tokens", short), ("30 tokens", long)):
    ratios[name] = float(gradients([text, other])[0].norm() / alone)
print(", ".join(f"beside {name}: {ratio:.3f}" for name, ratio in ratios.items()))

# Eight texts with and without a ninth, at a clip that none of them is longer than alone.
eight = [torch.randint(1, 64, (4,), generator=random) for _ in range(8)]
clip = max(float(gradients([one])[0].norm()) for one in [*eight, long])
moved = {}
for own_means in (False, True):
    difference = clipped_sum([*eight, long], clip, own_means) - clipped_sum(eight, clip, own_means)
    moved[own_means] = float(difference.norm()) / clip
print(
    f"the model's own loss: {moved[False]:.2f} clips, "
    f"the sum of each text's mean: {moved[True]:.2f} clips"
)

# 2 * 9 / (9 + 3) and 2 * 9 / (9 + 29): the first token of a text is nobody's target.
as_seen = (
    abs(ratios["itself"] - 1) < 1e-3
    and abs(ratios["4 tokens"] - 18 / 12) < 1e-3
    and abs(ratios["30 tokens"] - 18 / 38) < 1e-3
    and moved[False] > 1.2
    and moved[True] <= 1
)
sys.exit(0 if as_seen else "opacus and transformers behave otherwise now")
PY
