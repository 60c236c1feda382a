"""A folder that transformers loads: Mixtral, Qwen2Moe, Qwen3Moe or a dense model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from comigs.errors import UserError
from comigs.personal.export.form import Format, Written
from comigs.personal.export.outputs import outputs
from comigs.personal.export.source import Source
from comigs.personal.export.standard import standard_model


def write(source: Source, folder: Path, type: str) -> Written:
    """Save the standard model, its tokenizer, chat template and generation config."""
    model = standard_model(source)
    expected = outputs(model, source.windows)
    kind = f"It is a {model.config.architectures[0]}."
    model.to(getattr(torch, type)).save_pretrained(folder)
    source.base.tokenizer.save_pretrained(folder)
    return Written(expected, not source.mixing.gated, [kind])


@contextmanager
def read(source: Source, folder: Path) -> Iterator[Any]:
    """Give the saved model, computing in float32. Raises UserError for another tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ours = source.base.tokenizer.backend_tokenizer.to_str()
    if tokenizer.backend_tokenizer.to_str() != ours:
        raise UserError(
            f"base {source.base.title}: transformers reads its saved tokenizer back as another "
            "one, so that the export would be asked about other tokens than the run"
        )
    yield AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def run(source: Source) -> str:
    """Say how to run it in three tools."""
    return """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
ids = tokenizer("Once upon a time", return_tensors="pt", add_special_tokens=False)
print(tokenizer.decode(model.generate(**ids, max_new_tokens=40)[0]))
```

```sh
vllm serve FOLDER                                     # an OpenAI-compatible server, on a GPU
python convert_hf_to_gguf.py FOLDER --outtype f16     # llama.cpp's own converter
```"""


FORMAT = Format(
    "a folder for transformers: Mixtral, Qwen2Moe, Qwen3Moe, or a dense model",
    ("bfloat16", "float32"),
    write,
    read,
    run,
)
