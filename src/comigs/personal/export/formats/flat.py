"""One LoRA for everything that reads PEFT: the mixture flattened, its weights fitted on valid."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from comigs.personal.export.changes import require_no_merged
from comigs.personal.export.flatten import attention_pairs, flat_weights, flattened, pairs_of
from comigs.personal.export.form import Format, Written
from comigs.personal.export.lora_folder import read_lora, write_lora
from comigs.personal.export.outputs import outputs
from comigs.personal.export.source import Source


def write(source: Source, folder: Path, type: str) -> Written:
    """Write the one LoRA as a PEFT folder."""
    require_no_merged(source)
    weights, sentence = flat_weights(source)
    pairs = pairs_of(source, weights) | attention_pairs(source)
    with flattened(source, pairs):
        expected = outputs(source.base.model, source.windows)
    write_lora(folder, source.base, pairs)
    return Written(expected, source.mixing.is_single, [sentence])


@contextmanager
def read(source: Source, folder: Path) -> Iterator[Any]:
    """Give the base with the folder's LoRA on it."""
    with flattened(source, read_lora(folder, source.base)):
        yield source.base.model


def run(source: Source) -> str:
    """Say how to run it in three tools."""
    return f"""The base is {source.base.title}: `adapter_config.json` says where it was found.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("BASE")
model = PeftModel.from_pretrained(base, "FOLDER")
model.save_pretrained("COPY", save_embedding_layers=False)   # PEFT else asks the network for BASE
```

```sh
vllm serve BASE --enable-lora --lora-modules {source.client.lower()}=FOLDER
python convert_lora_to_gguf.py FOLDER --base BASE            # llama.cpp's own converter
```"""


FORMAT = Format(
    "one LoRA for PEFT, nearly the mixture",
    ("float32",),
    write,
    read,
    run,
    holds=("experts",),
)
