"""This module makes a base of a GGUF file, dequantised once into the cache.

`transformers` reads a part of what a GGUF can say, and is silent about the rest. What it would
leave out is refused here.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from transformers import GgufConfig

from comigs.bases.pretrained import (
    cannot_load,
    load_model,
    load_pretrained,
    load_tokenizer,
    read_config,
)
from comigs.bases.text_rules import RULES
from comigs.errors import UserError
from comigs.files import cache_folder
from comigs.processes import Child

REFUSED = 2  # the code with which the process that unpacks ends after a UserError


def is_gguf(file: Path) -> bool:
    """Return whether a file begins as a GGUF does."""
    with file.open("rb") as opened:
        return opened.read(4) == b"GGUF"


def load_gguf(file: Path, require_family: Callable[[str], object]) -> tuple[Any, Any]:
    """Load the model and its tokenizer from a GGUF file, or from what the cache has of it.

    `require_family` raises UserError for a model_type that is not known. Raises UserError for a
    file that is damaged, or says what transformers does not read.
    """
    # What the head of the file says comes before gigabytes are read.
    reader = _reader(file)
    rule = _rule_of(file, reader)
    _require_plain_positions(file, reader)
    config = read_config(file.parent, gguf_file=file.name)
    require_family(config.model_type)
    _require_heads(file, reader, config)
    # The same file under another name, or in another place, is the same base.
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    folder = cache_folder() / "bases" / f"gguf-{digest[:32]}"
    if not folder.is_dir():
        unpack(file, folder, torch.float32)
    model, tokenizer = load_pretrained(folder)
    # transformers gives byte-level BPE the rule of GPT-2, whatever the file names (decision 14).
    if rule is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = RULES[rule]()
        # Llama 3 takes a word that is a token for that token, without asking the merges.
        tokenizer.backend_tokenizer.model.ignore_merges = rule == "llama-bpe"
    return model, tokenizer


def unpack(file: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write the model and the tokenizer of a GGUF as transformers keeps them, in a process of its
    own: the whole model is in its memory, and a run stays below base.memory. Raises UserError.
    """
    # A folder that is there is whole: it is moved into place at the end. What a process that was
    # stopped has left goes with the scratch folder, which is this one's.
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        whole = Path(scratch) / "base"
        words = (str(file), str(whole), str(dtype).removeprefix("torch."))
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        with Child(f"{__name__}:main", words, 0, **pipes) as child:
            try:
                _, said = child.communicate()
            finally:
                child.stop()

        # Anything but its own refusal is a fault, of which the last line says most.
        last = (said.strip() or f"it ended with code {child.returncode}").splitlines()[-1]
        if child.returncode == REFUSED:
            raise UserError(last)
        if child.returncode:
            raise cannot_load(file, f"the process that unpacks it failed ({last})")
        try:
            whole.rename(folder)
        except OSError:
            if not folder.is_dir():  # where it is, another process was faster
                raise


def main() -> None:
    """Be the process that unpacks FILE into FOLDER as DTYPE."""
    file, folder, dtype = sys.argv[1:]
    try:
        unpack_here(Path(file), Path(folder), getattr(torch, dtype))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(REFUSED)


def unpack_here(file: Path, folder: Path, dtype: torch.dtype) -> None:
    """Do what `unpack` does in this process. Raises UserError."""
    # Without dequantize, transformers 5 keeps the weights packed, which is slow and not trainable
    # through.
    whole_numbers = GgufConfig(dequantize=True)
    read: dict[str, Any] = {"quantization_config": whole_numbers, "dtype": dtype}
    # transformers shows a bar that no setting of its own switches off.
    with contextlib.redirect_stderr(io.StringIO()):
        model = load_model(file.parent, gguf_file=file.name, **read)
    _require_all_numbers(file, model)
    model.save_pretrained(folder)
    load_tokenizer(file.parent, gguf_file=file.name).save_pretrained(folder)


def _reader(file: Path) -> Any:
    """Open a GGUF whose tensors are all there. Raises UserError."""
    # The library maps the file, and fails in many ways where it ends too early.
    try:
        return GGUFReader(file)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise cannot_load(
            file, f"it is a GGUF that is cut short or damaged ({reason}); copy it again"
        ) from None


def _said(reader: Any, key: str) -> Any:
    """Return what a GGUF says under a key; None where it says nothing."""
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _rule_of(file: Path, reader: Any) -> str | None:
    """Return the name of the rule that cuts text; None for tokenizers without one."""
    if _said(reader, "tokenizer.ggml.model") != "gpt2":
        return None
    rule = _said(reader, "tokenizer.ggml.pre")
    if rule not in RULES:
        raise cannot_load(
            file,
            f'its tokenizer cuts text by the rule "{rule}"; known: {", ".join(RULES)}. Give the '
            "model as a folder, with its tokenizer.json",
        )
    return str(rule)


def _require_plain_positions(file: Path, reader: Any) -> None:
    """Refuse positions that are scaled, which transformers does not read. Raises UserError."""
    kind = _said(reader, f"{_said(reader, 'general.architecture')}.rope.scaling.type")
    factors = [t.name for t in reader.tensors if t.name.startswith("rope_")]
    if kind in (None, "none") and not factors:
        return
    what = factors[0] if factors else f'rope.scaling.type = "{kind}"'
    raise cannot_load(
        file,
        f"it scales positions ({what}), which transformers leaves out of a GGUF; give the model as "
        "a folder (config.json, safetensors)",
    )


def _require_heads(file: Path, reader: Any, config: Any) -> None:
    """Refuse heads of another width than transformers takes them to have. Raises UserError."""
    key = f"{_said(reader, 'general.architecture')}.attention.key_length"
    width, read = _said(reader, key), getattr(config, "head_dim", None)
    if None not in (width, read) and width != read:
        raise cannot_load(
            file,
            f"its heads have {width} dimensions ({key}), which transformers does not read of such "
            f"a GGUF and takes for {read}; give the model as a folder (config.json, safetensors)",
        )


def _require_all_numbers(file: Path, model: Any) -> None:
    """Refuse a file of which transformers left something out. Raises UserError."""
    held = sum(int(tensor.n_elements) for tensor in GGUFReader(file).tensors)
    read = sum(parameter.numel() for parameter in model.parameters())
    if held != read:
        raise cannot_load(
            file,
            f"it holds {held:,} numbers, and the model that transformers makes of it {read:,}; "
            "give the model as a folder (config.json, safetensors)",
        )
