"""This module loads a model and its tokenizer with `transformers`: whole, or not at all.

`transformers` fills in random numbers for weights that a file lacks, and goes on. What it reports
beside the model decides here, for every loader.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
from transformers.utils.peft_utils import find_adapter_config_file

from comigs.bases.refused import require_no_refused
from comigs.errors import UserError

LFS = b"version https://git-lfs"  # how a file begins that git-lfs has not fetched
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
PARTS = ("*.json", "*.safetensors", "tokenizer.model", "vocab.txt", "merges.txt")
NAMED = 3  # keys that a message names


def load_pretrained(name: str | Path) -> tuple[Any, Any]:
    """Load a model and its tokenizer from a folder, the hub or its cache.

    Raises UserError where a part is missing, damaged, or of a kind that experts cannot train on.
    """
    # What can be said of files is said before gigabytes are read.
    folder = Path(name)
    if folder.is_dir():
        _require_whole_files(folder)
    with _in_one_line(name):
        if find_adapter_config_file(str(name)) is not None:
            raise cannot_load(
                name,
                "it is an adapter (PEFT), not a whole model; merge it into its base "
                "(merge_and_unload, then save_pretrained) and give that folder",
            )
    config = read_config(name)
    _require_unquantised(name, config)
    return load_model(name), load_tokenizer(name)


def read_config(name: str | Path, **settings: Any) -> Any:
    """Read a model's config. `settings` go to `from_pretrained`. Raises UserError."""
    with _in_one_line(_file(name, settings)):
        # No code from a model's folder is ever run.
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **settings)
    require_no_refused(config.model_type)
    return config


def load_model(name: str | Path, **settings: Any) -> Any:
    """Load a model with all of its weights. `settings` go to `from_pretrained`. Raises UserError.

    No tensor may be absent but one that is tied to another, as an output layer to the embedding.
    """
    file = _file(name, settings)
    with _in_one_line(file):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            # Without it, tensors of another shape are an error that does not name them.
            ignore_mismatched_sizes=True,
            **settings,
        )
    model, report = loaded
    _require_all_weights(file, model, report)
    return model


def load_tokenizer(name: str | Path, **settings: Any) -> Any:
    """Load a tokenizer. `settings` go to `from_pretrained`. Raises UserError."""
    # The library makes a fast tokenizer of whatever files there are.
    try:
        with _in_one_line(_file(name, settings)):
            return AutoTokenizer.from_pretrained(name, trust_remote_code=False, **settings)
    except UserError as error:
        # The library's own line speaks of whichever package it tried last.
        folder, installed = Path(name), importlib.util.find_spec("sentencepiece")
        has_sentences = (folder / "tokenizer.model").exists() or "sentencepiece" in str(error)
        if has_sentences and not installed:
            raise cannot_load(
                name,
                "reading its tokenizer.model needs the package sentencepiece; pip install "
                "sentencepiece protobuf, or add the tokenizer's tokenizer.json",
            ) from None
        if folder.is_dir() and not list(folder.glob("tokenizer.*")):
            raise cannot_load(name, "it has no tokenizer (tokenizer.json); add its files") from None
        raise


def cannot_load(name: str | Path, why: str) -> UserError:
    """Return the error of a base that is there and cannot be used."""
    return UserError(f'base.name: "{name}" cannot be loaded: {why}')


def _file(name: str | Path, settings: dict[str, Any]) -> str | Path:
    """Return what a message names: the library is given the folder of a GGUF, a user the file."""
    return Path(name) / settings["gguf_file"] if "gguf_file" in settings else name


@contextmanager
def _in_one_line(name: str | Path) -> Iterator[None]:
    """Turn whatever the library raises inside into a UserError.

    It raises a dozen kinds for files that people really have; none of them is a bug of ours. Its
    warnings are left out: what they say of weights is decided here.
    """
    # The verbosity is the whole process's, so it is put back.
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except (UserError, MemoryError):
        raise
    except RecursionError:
        raise cannot_load(name, "a JSON file in it is nested too deep") from None
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise cannot_load(name, "it needs code of its own, and none is run") from None
        lines = str(error).strip().splitlines() or ["no reason given"]
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        raise cannot_load(name, kind + lines[0]) from None
    finally:
        logging.set_verbosity(before)


def _require_whole_files(folder: Path) -> None:
    """Refuse a folder with a file that is not what its name says. Raises UserError."""
    for pattern in PARTS:
        for file in sorted(folder.glob(pattern)):
            _require_whole(folder, file)

    # An adapter has no config.json either, and is told so later.
    if (folder / "adapter_config.json").exists():
        return
    if not (folder / "config.json").exists():
        why = "it has no config.json; give a folder that save_pretrained wrote"
        if list(folder.glob("*.gguf")):
            why = "it holds GGUF; give the .gguf file itself as base.name"
        raise cannot_load(folder, why)
    if not list(folder.glob("*.safetensors*")):
        raise cannot_load(
            folder,
            "it has no weights as safetensors (model.safetensors); load it with transformers once "
            "and save it with save_pretrained",
        )


def _require_whole(folder: Path, file: Path) -> None:
    # A pointer and a mark are seen at the start, what is cut short by its header.
    try:
        with file.open("rb") as opened:
            start = opened.read(len(LFS))
        if start == LFS:
            raise cannot_load(
                folder, f"{file.name} is a git-lfs pointer, not the file; run `git lfs pull` in it"
            )
        if file.suffix == ".json" and start.startswith(BYTE_ORDER_MARK):
            raise cannot_load(
                folder, f"{file.name} begins with a byte order mark; save it as UTF-8 without one"
            )
        if file.suffix == ".safetensors":
            with safe_open(file, "pt"):
                pass
    except SafetensorError as error:
        raise cannot_load(
            folder, f"{file.name} is cut short or damaged ({error}); copy or download it again"
        ) from None
    except OSError as error:
        raise cannot_load(folder, f"{file.name}: {error.strerror or error}") from None


def _require_unquantised(name: str | Path, config: Any) -> None:
    """Refuse weights that were packed, whatever is installed here. Raises UserError."""
    packed = getattr(config, "quantization_config", None)
    if packed is None:
        return
    method = packed.get("quant_method") if isinstance(packed, dict) else packed.quant_method
    raise cannot_load(
        name,
        f"its weights are quantised ({getattr(method, 'value', method)}), and experts are trained "
        "through whole ones; give the model that it was made from",
    )


def _require_all_weights(name: str | Path, model: Any, report: dict[str, Any]) -> None:
    """Refuse a model that is not what its files hold. Raises UserError, naming the tensors."""
    head = "what it says of itself" if Path(name).is_file() else "its config.json"
    if shapes := sorted(report["mismatched_keys"]):
        key, found, wanted = shapes[0]
        raise cannot_load(
            name,
            f"{head} and its weights differ: {key} has the shape {tuple(found)}, not "
            f"{tuple(wanted)}{_and_more(shapes, 1)}",
        )
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing:
        # Where what they are tied to is missing, that is the reason.
        missing = [key for key in missing if key not in model.all_tied_weights_keys] or missing
        why = f"its weights lack {_named(missing)}"
        if prefix := _prefix(missing, unexpected):
            why += (
                f'; all names begin with "{prefix}", as a wrapper has saved them: save the model '
                "inside it"
            )
        raise cannot_load(name, why)

    # Heads of other tasks are no part of the model; a layer more, or a bias, is.
    inside = {part for part, _ in model.named_children()}
    inside |= {part for part, _ in model.base_model.named_children()}
    if surplus := [key for key in unexpected if key.split(".")[0] in inside]:
        raise cannot_load(
            name, f"its weights have what {head} does not speak of: {_named(surplus)}"
        )
    if report["error_msgs"]:
        raise cannot_load(name, str(report["error_msgs"][0]).splitlines()[0])


def _prefix(missing: list[str], unexpected: Iterable[str]) -> str:
    """Return what stands before a missing key in the file; '' where it is under no other name."""
    for key in unexpected:
        if key.endswith(f".{missing[0]}"):
            return key.removesuffix(missing[0])
    return ""


def _named(keys: list[str]) -> str:
    return ", ".join(keys[:NAMED]) + _and_more(keys, NAMED)


def _and_more(keys: list[Any], shown: int) -> str:
    return f" (and {len(keys) - shown} more)" if len(keys) > shown else ""
