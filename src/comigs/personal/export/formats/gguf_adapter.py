"""The personal half of the on-device format: a GGUF of a few MB that goes on a `gguf-base`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from comigs.personal.export.changes import changes, require_shareable
from comigs.personal.export.form import Format, Written
from comigs.personal.export.formats.gguf import in_python
from comigs.personal.export.formats.gguf_base import file_name
from comigs.personal.export.gguf_file import finish, require_gguf, the_gguf
from comigs.personal.export.gguf_tensors import TYPES, Place, architecture_of, places, to_pairs
from comigs.personal.export.outputs import outputs
from comigs.personal.export.source import Source
from comigs.personal.export.standard import routers_of, standard_model


def write(source: Source, folder: Path, type: str) -> Written:
    """Write the client's changes as CLIENT.gguf, without an alpha: llama.cpp then scales by 1."""
    require_shareable(source)
    model = standard_model(source, shared=True)
    require_gguf(model, source.base.tokenizer)
    expected = outputs(model, source.windows)
    writer = gguf.GGUFWriter(folder / f"{source.client}.gguf", architecture_of(model.config))
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_name(f"{source.client} ({source.folder.config().name})")
    # The LoRA of each part goes where the model's own matrix of that part is.
    by_name = {place.name: place for place in places(model)}
    routers = [] if source.mixing.is_uniform else routers_of(source)
    for layer in range(len(source.attachment.mixtures)):
        for part, (A, B) in changes(source, layer, routers).items():
            place = by_name[f"blk.{layer}.{part}.weight"]
            _add(writer, place, "lora_a", A, type)
            _add(
                writer,
                place,
                "lora_b",
                B if place.heads is None else to_pairs(B, place.heads),
                type,
            )
    finish(writer)
    note = f"Goes on {file_name(source)}, which `--to gguf-base` makes, once for all clients."
    return Written(expected, not source.mixing.gated, [note])


def _add(writer: Any, place: Place, side: str, tensor: Tensor, type: str) -> None:
    """Write one side of a LoRA, a router's in float32, as a choice deserves."""
    kind = TYPES["float32"] if "ffn_gate_inp" in place.name else TYPES[type]
    numbers = gguf.quants.quantize(tensor.float().contiguous().numpy(), kind)
    writer.add_tensor(f"{place.name}.{side}", numbers, raw_dtype=kind)


@contextmanager
def read(source: Source, folder: Path) -> Iterator[Any]:
    """Give the blank model in float32, with the file's LoRA added to its matrices."""
    path = the_gguf(folder)
    model = standard_model(source, blank=True, shared=True)
    state, found = model.state_dict(), {}
    for tensor in gguf.GGUFReader(path).tensors:
        numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        found[tensor.name] = torch.from_numpy(np.array(numbers, dtype=np.float32))
    for place in places(model):
        if f"{place.name}.lora_a" in found:
            A, B = found.pop(f"{place.name}.lora_a"), found.pop(f"{place.name}.lora_b")
            place.put(state, place.of(state) + B @ A)
    assert not found, f"{path}: {sorted(found)} have no place"
    yield model


def run(source: Source) -> str:
    """Say how to run it in three tools."""
    base, adapter = file_name(source), f"{source.client}.gguf"
    return f"""Make {base} once with `comigs export RUN --client NAME --to gguf-base`.

```sh
llama-cli -m {base} --lora {adapter} -p "Once upon a time" -n 40     # llama.cpp
llama-server -m {base} --lora {adapter}                              # its OpenAI-compatible server
```

{in_python(base, adapter)}"""


FORMAT = Format(
    "a client's own few MB for a gguf-base",
    ("float16", "float32"),
    write,
    read,
    run,
)
