"""One GGUF for llama.cpp and what is made with it: LM Studio, Ollama, phones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from comigs.personal.export.form import Format, Written
from comigs.personal.export.gguf_file import read_gguf, require_gguf, the_gguf, write_gguf
from comigs.personal.export.gguf_text import notes_on
from comigs.personal.export.outputs import outputs
from comigs.personal.export.source import Source
from comigs.personal.export.standard import standard_model


def write(source: Source, folder: Path, type: str) -> Written:
    """Write the standard model as CLIENT.gguf."""
    model = standard_model(source)
    require_gguf(model, source.base.tokenizer)
    expected = outputs(model, source.windows)
    title = f"{source.client} ({source.folder.config().name})"
    write_gguf(folder / f"{source.client}.gguf", model, source.base.tokenizer, type, title)
    return Written(expected, not source.mixing.gated, notes_on(source.base.tokenizer))


@contextmanager
def read(source: Source, folder: Path) -> Iterator[Any]:
    """Give the file's numbers, dequantised, in the standard model."""
    path = the_gguf(folder)
    yield read_gguf(path, standard_model(source, blank=source.mixing.routing == "token"))


def run(source: Source) -> str:
    """Say how to run it in three tools."""
    file = f"{source.client}.gguf"
    return f"""```sh
llama-cli -m {file} -p "Once upon a time" -n 40        # llama.cpp
llama-server -m {file}                                 # its OpenAI-compatible server
```

{in_python(file)}"""


def in_python(file: str, adapter: str | None = None) -> str:
    """Say how to run a file in Python, with an adapter on it."""
    lora = ""
    if adapter is not None:
        lora = f'settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo("{adapter}", 1.0)]\n'
    return f"""```python
import xllamacpp  # pip install xllamacpp

settings = xllamacpp.CommonParams()
settings.model.path = "{file}"
{lora}server = xllamacpp.Server(settings)
print(server.handle_completions({{"prompt": "Once upon a time", "max_tokens": 40}}))
```"""


def refused(type: str) -> str | None:
    """Say why there is no merged model in few bits."""
    if type.lower().startswith(("q2", "q3", "q4", "q5", "q6", "iq")):
        return (
            "a merged update vanishes on so coarse a grid (q4_1 cost 83 % in perplexity on "
            'SmolLM2); use gguf with q8_0, or "gguf-base" with q4_1 and "gguf-adapter" beside it'
        )
    return None


FORMAT = Format(
    "one GGUF for llama.cpp, LM Studio, Ollama",
    ("float16", "bfloat16", "q8_0", "float32"),
    write,
    read,
    run,
    refused,
)
