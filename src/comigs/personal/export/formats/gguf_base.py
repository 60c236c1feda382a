"""The shared half of the on-device format: one GGUF per base, E and K, in any number type.

E copies of the base's MLP and a router of zeros. It holds nothing of anybody's; `gguf-adapter`
makes it a client's own. Rounding the base does not round the update, which stays beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from comigs.personal.export.changes import require_shareable
from comigs.personal.export.form import Format, Written
from comigs.personal.export.formats.gguf import in_python
from comigs.personal.export.gguf_file import read_gguf, require_gguf, the_gguf, write_gguf
from comigs.personal.export.gguf_text import notes_on
from comigs.personal.export.outputs import outputs
from comigs.personal.export.source import Source
from comigs.personal.export.standard import standard_model


def write(source: Source, folder: Path, type: str) -> Written:
    """Write the blank model, which must answer as the client's with the client's changes."""
    require_shareable(source)
    expected = outputs(standard_model(source, shared=True), source.windows)
    blank = standard_model(source, blank=True, shared=True)
    require_gguf(blank, source.base.tokenizer)
    # Its title says whom it serves.
    mixing = source.mixing
    kind = "the base" if mixing.is_single else f"{mixing.num_experts} copies of each MLP"
    title = f"{source.base.title}, {kind}"
    write_gguf(folder / file_name(source), blank, source.base.tokenizer, type, title)
    whose = f"with {mixing.num_experts} experts, {mixing.top_k} of them for a token"
    if mixing.is_single:
        whose = "with a single expert"
    notes = [
        f"Holds {kind}, for every client {whose}, and nothing of any client. The perplexity is "
        f"with {source.client}'s changes on it.",
        *notes_on(source.base.tokenizer),
    ]
    return Written(expected, not source.mixing.gated, notes)


@contextmanager
def read(source: Source, folder: Path) -> Iterator[Any]:
    """Give the file's base, with the client's changes on it in float32."""
    path = the_gguf(folder)
    blank, own = (
        standard_model(source, blank=True, shared=True),
        standard_model(source, shared=True),
    )
    changed = own.state_dict()
    for name, tensor in blank.state_dict().items():
        if name != "lm_head.weight" or not own.config.tie_word_embeddings:
            changed[name] -= tensor
    # They go on what the file holds, however roughly that is stored.
    read_gguf(path, blank)
    for name, tensor in blank.state_dict().items():
        if name != "lm_head.weight" or not own.config.tie_word_embeddings:
            changed[name] += tensor
    yield own


def file_name(source: Source) -> str:
    """Return one name per base, E and K, so that files of several do not look alike."""
    mixing = source.mixing
    if mixing.is_single:
        return f"{source.base.title}.gguf"
    return f"{source.base.title}-{mixing.num_experts}x{mixing.top_k}.gguf"


def run(source: Source) -> str:
    """Say how to run it in three tools."""
    base, adapter = file_name(source), f"{source.client}.gguf"
    return f"""Make each client's adapter with `comigs export RUN --client NAME --to gguf-adapter`.

```sh
llama-cli -m {base} --lora {adapter} -p "Once upon a time" -n 40     # llama.cpp
llama-server -m {base} --lora {adapter}       # its server; more --lora: more clients
```

{in_python(base, adapter)}

The server puts every adapter that it is given on by default: name the scale of each in a request,
as `"lora": [{{"id": 0, "scale": 1}}, {{"id": 1, "scale": 0}}]`."""


FORMAT = Format(
    "one GGUF for all clients with as many experts, which a gguf-adapter makes personal",
    ("q8_0", "q4_1", "q4_0", "q5_1", "q5_0", "float16", "bfloat16", "float32"),
    write,
    read,
    run,
    holds=(),
)
