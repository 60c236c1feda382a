"""Every expert exactly, as a PEFT folder each, and the router beside them.

`generalist-0`, `specialist-0`, `rest` hold an expert with the attention's LoRA, and are whole
adapters; an expert that is the sum of two parts has both in its name. `attention` holds the
attention's LoRA alone. `router.safetensors` and `mixture.json` say how the experts are weighed, for
programs that do it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from comigs.experts.router import LEAD
from comigs.methods.lowrank import Pair
from comigs.personal.export.changes import require_no_merged
from comigs.personal.export.flatten import attention_pairs, put
from comigs.personal.export.form import Format, Written
from comigs.personal.export.lora_folder import read_lora, write_lora
from comigs.personal.export.outputs import outputs
from comigs.personal.export.source import Source
from comigs.personal.export.weights import scaled
from comigs.runs.checkpoint import write_tensors
from comigs.slots import OTHERS

ROUTER, MIXTURE, ATTENTION = "router.safetensors", "mixture.json", "attention"
WEIGHING = {
    "token": "logits = x W^T, x the input of the block's MLP",
    "sequence": "logits = m W^T, m the mean of the MLP's inputs up to the token",
    "client": "logits = W, the same for every token",
}


def write(source: Source, folder: Path, type: str) -> Written:
    """Write a folder per expert, one for attention, and what weighs the experts."""
    require_no_merged(source)
    # Every expert is a whole adapter, so that the attention's LoRA is in each.
    attention = attention_pairs(source)
    for number, parts in enumerate(source.experts):
        write_lora(folder / folder_of(parts), source.base, expert_pairs(source, number) | attention)
    write_lora(folder / ATTENTION, source.base, attention)
    # The routers are no adapter, and go into a file of their own.
    routers = {}
    for layer, mixture in enumerate(source.attachment.mixtures):
        if mixture.bound.W_ED is not None:
            routers[f"{layer}.W"] = mixture.bound.W_ED
        if mixture.bound.gate is not None:
            routers[f"{layer}.open"] = mixture.bound.gate
    if routers:
        write_tensors(folder / ROUTER, routers)
    described = json.dumps(mixture_of(source), indent=1) + "\n"
    (folder / MIXTURE).write_text(described, encoding="utf-8")
    return Written(outputs(source.base.model, source.windows), True, notes(source))


def folder_of(parts: Sequence[str]) -> str:
    """Return the folder of an expert: ("g0", "s0") is "generalist-0-specialist-0"."""
    if tuple(parts) == (OTHERS,):
        return OTHERS
    roles = {"g": "generalist", "s": "specialist"}
    return "-".join(f"{roles[part[0]]}-{part[1:]}" for part in parts)


def expert_pairs(source: Source, number: int) -> dict[tuple[int, str], Pair]:
    """Return one expert's LoRA in every block."""
    sites = list(source.base.architecture.mlp_linears())
    found = {}
    for layer, mixture in enumerate(source.attachment.mixtures):
        for site in sites:
            found[layer, site] = scaled(mixture.bound.experts[number], site)
    return found


def mixture_of(source: Source) -> dict[str, Any]:
    """Return what a program needs to weigh the experts as the run does."""
    mixture, private = source.attachment.mixtures[0].bound, source.private_parts
    # One sentence says how the weights follow from the logits.
    rule = "a token uses the top_k largest logits; their softmax are the weights"
    if mixture.top_k == 1:
        rule = "a token uses the largest of the softmax over all logits, which is its weight"
    if mixture.W_ED is None:
        rule = "every expert weighs the same"
    if mixture.gate is not None:
        rule += (
            "; first, `lead` is taken from the last logit, and the weights are (1 - open) times "
            "those of a router without the last expert, plus open times these"
        )
    # The order of the experts is that of the router's rows.
    experts = []
    for parts in source.experts:
        is_private = any(part in private for part in parts)
        experts.append({"parts": parts, "folder": folder_of(parts), "private": is_private})
    return {
        "experts": experts,
        "attention": {"folder": ATTENTION, "in_every_expert": True},
        "router": ROUTER if mixture.W_ED is not None else None,
        "logits": WEIGHING[mixture.routed_by] if mixture.W_ED is not None else None,
        "top_k": mixture.top_k if mixture.W_ED is not None else None,
        "lead": LEAD if mixture.gate is not None else None,
        "rule": rule,
    }


def notes(source: Source) -> list[str]:
    """Say what is in which folder."""
    folders = ", ".join(map(folder_of, source.experts))
    return [
        f"A folder per expert ({folders}), each with the attention's LoRA in it, is an adapter of "
        "its own: that expert alone, with weight 1.",
        f"{MIXTURE} and {ROUTER} say how they are mixed; attention is in each and counts once.",
    ]


@contextmanager
def read(source: Source, folder: Path) -> Iterator[Any]:
    """Give the mixture rebuilt from the folders: experts, attention and router."""
    described = json.loads((folder / MIXTURE).read_text(encoding="utf-8"))
    experts = [read_lora(folder / e["folder"], source.base) for e in described["experts"]]
    attention = read_lora(folder / ATTENTION, source.base)
    put(source, [expert | attention for expert in experts], router=True)
    if described["router"] is not None:
        routers = load_file(folder / described["router"])
        for layer, mixture in enumerate(source.attachment.mixtures):
            router, gate = routers[f"{layer}.W"], routers.get(f"{layer}.open")
            mixture.bind(replace(mixture.bound, W_ED=router, gate=gate))
    try:
        yield source.base.model
    finally:
        source.attachment.bind(source.model.tensors)


def run(source: Source) -> str:
    """Say how to run it in three tools."""
    one = folder_of(source.experts[0])
    # One expert is what these tools load; the mixture of them is ours alone.
    return f"""The base is {source.base.title}: each `adapter_config.json` says where it was found.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("BASE")
model = PeftModel.from_pretrained(base, "FOLDER/{one}")
```

```sh
vllm serve BASE --enable-lora --lora-modules one=FOLDER/{one}
python convert_lora_to_gguf.py FOLDER/{one} --base BASE      # llama.cpp's own converter
comigs evaluate RUN --model FOLDER                           # all of them, mixed
```"""


FORMAT = Format("a PEFT folder per expert, and the router", ("float32",), write, read, run)
