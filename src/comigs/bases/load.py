"""This module leads from a name to a frozen model, its tokenizer and where experts go in it."""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils import logging

from comigs import bases, csrc
from comigs.bases import attention
from comigs.bases.base import Architecture, Loader
from comigs.bases.chat_encoder import ChatEncoder
from comigs.bases.chat_template import use_template
from comigs.bases.from_gguf import is_gguf, load_gguf
from comigs.bases.packed import forget, pack
from comigs.bases.pretrained import load_pretrained
from comigs.bases.tiny import byte_tokenizer
from comigs.bases.tokenizer import TextEncoder
from comigs.bases.usable import end_ids, require_usable
from comigs.config import BaseSection
from comigs.errors import UserError, nearest
from comigs.processes import free_at_once


@dataclass(frozen=True)
class Base:
    """A base is a frozen model, held once however many clients and experts there are.

    dtype: of the weights and of autocast. fingerprint: sha256 of all weights and the tokenizer.
    """

    name: str
    model: Any
    tokenizer: Any
    encoder: TextEncoder
    architecture: Architecture
    device: torch.device
    dtype: torch.dtype
    fingerprint: str

    @property
    def title(self) -> str:
        """Its name for others: a path's last part, so that no path of this machine goes out."""
        return Path(self.name).name if Path(self.name).exists() else self.name


def load_base(section: BaseSection) -> Base:
    """Load, freeze and place the base that the config names. Raises UserError."""
    logging.disable_progress_bar()
    device = _device(section.device)
    if section.memory is not None:
        if device.type != "cpu":
            raise UserError("base.memory: given, but the base is on a GPU; it is for CPUs only")
        free_at_once()
    if device.type == "cuda":
        # cuDNN's attention makes a plan for each new shape, of which texts and answers have many
        torch.backends.cuda.enable_cudnn_sdp(False)
    dtype = _dtype(section.dtype, device)
    # A template that is none is said before gigabytes are read.
    if section.chat_template is not None:
        use_template(byte_tokenizer(), section.chat_template)
    model, tokenizer = _named(section.name)
    if section.tokenizer != "own":
        _read_as_before(section, tokenizer)
    if section.chat_template is not None:
        use_template(tokenizer, section.chat_template)
    architecture = architecture_of(model)
    require_usable(model, tokenizer, architecture)
    pack(model, architecture, section.weights, section.name)
    model.set_attn_implementation(_attention(section, model, device))
    # How the next token is chosen is for who asks: no beams, penalties or sampling of the base's.
    own = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id
    )
    # Windows have no padding; else transformers warns wherever the id occurs in text.
    model.config.pad_token_id = None
    # A head that was trained apart from the embedding is not tied to it, whatever the config says.
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    model.config.tie_word_embeddings = head.weight is embedding.weight
    # rounded first, so that a device never holds more than it will
    set_dtype(model.requires_grad_(False).eval(), dtype)
    model.to(device)
    chats = ChatEncoder(
        name=section.name,
        tokenizer=tokenizer,
        longest=model.config.max_position_embeddings,
        rows=model.get_input_embeddings().weight.shape[0],
        ends=end_ids(model, tokenizer),
    )
    encoder = TextEncoder(tokenizer, chats)
    return Base(
        name=section.name,
        model=model,
        tokenizer=tokenizer,
        encoder=encoder,
        architecture=architecture,
        device=device,
        dtype=dtype,
        fingerprint=_fingerprint(model, encoder),
    )


def set_dtype(model: Any, dtype: torch.dtype) -> None:
    """Give a model's weights this type, and leave its buffers as they are.

    The frequencies by which a base tells positions apart are a buffer. Rounded to bfloat16 they are
    wrong by up to 0.4 %, which after some hundred tokens is another position.
    """
    for weight in model.parameters():
        before, weight.data = weight.data, weight.data.to(dtype)
        if before.dtype != dtype:
            forget(before)


def fast_at_bfloat16(device: torch.device) -> bool:
    """Return whether bfloat16 is no slower than float32; where it is, it is ten times slower."""
    if device.type == "cuda":  # before Ampere it is emulated
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # processors of ARM say it in another way; on a Mac PyTorch has nothing that uses it
    asked: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    of_arm = sys.platform == "linux" and asked().get("bf16", False)
    return bool(torch.cpu._is_avx512_bf16_supported() or of_arm)


def give_back() -> None:
    """Let others have what this process holds of a GPU's memory and does not use."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def as_fast(base: Base) -> Base:
    """Return a base that computes in float32 where bfloat16 is slow, with the same weights.

    Its fingerprint stays that of the weights as they were loaded.
    """
    if base.dtype != torch.bfloat16 or fast_at_bfloat16(base.device):
        return base
    set_dtype(base.model, torch.float32)
    return replace(base, dtype=torch.float32)


def require_window(base: Base, length: int) -> None:
    """Raise UserError where a base cannot read windows of so many tokens."""
    window = base.model.config.max_position_embeddings
    if length > window:
        raise UserError(
            f"data.sequence_length: given {length}, but base {base.name} reads at most {window} "
            f"tokens at once; set it to {window} or less"
        )


def modules() -> dict[str, ModuleType]:
    """Return by its name every file here that offers an ARCHITECTURE or LOADERS."""
    found = {}
    for file in pkgutil.iter_modules(bases.__path__):
        module = importlib.import_module(f"comigs.bases.{file.name}")
        if hasattr(module, "ARCHITECTURE") or hasattr(module, "LOADERS"):
            found[file.name] = module
    return found


def loaders() -> dict[str, Loader]:
    """Return the bases that go by a name of ours."""
    found: dict[str, Loader] = {}
    for module in modules().values():
        found |= getattr(module, "LOADERS", {})
    return found


def architecture_of(model: Any) -> Architecture:
    """Return the record that fits a loaded model. Raises UserError."""
    return family_of(model.config.model_type)


def family_of(model_type: str) -> Architecture:
    """Return the record that fits a model_type. Raises UserError naming the families there are."""
    known: list[str] = []
    for module in modules().values():
        if hasattr(module, "ARCHITECTURE"):
            record: Architecture = module.ARCHITECTURE
            if model_type in record.model_types:
                return record
            known += record.model_types
    raise UserError(
        f'base: the model family "{model_type}" is not known; '
        f"known: {', '.join(sorted(known))} (CONTRIBUTING.md: add a base)"
    )


def _named(name: str) -> tuple[Any, Any]:
    """Load a base by our own names, else from a local folder, else from the hub or its cache."""
    ours = loaders()
    if name in ours:
        return ours[name].load()
    if Path(name).is_file():
        if is_gguf(Path(name)):
            return load_gguf(Path(name), family_of)
        raise UserError(
            f'base.name: unknown base "{name}": it is a file and no GGUF; give the folder that it '
            "is in"
        )
    # The hub would take long to say that it has no such name.
    if not Path(name).is_dir() and not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        known = list(ours)
        raise UserError(
            f'base.name: unknown base "{name}".{nearest(name, known)} Known: {", ".join(known)}; '
            "or a local folder, a .gguf file, or a hub name like org/model"
        )
    return load_pretrained(name)


def _read_as_before(section: BaseSection, tokenizer: Any) -> None:
    """Give the tokenizer the rule by which runs read this base before it had its own.

    Raises UserError for a base that was always read by its own.
    """
    older: dict[str, Any] = {}
    for module in modules().values():
        older |= getattr(module, "OLDER_RULES", {})
    if section.name not in older:
        raise UserError(
            f'base.tokenizer: given "{section.tokenizer}", which is for {", ".join(older)} only; '
            f'base {section.name} has its own rule, "own"'
        )
    tokenizer.backend_tokenizer.pre_tokenizer = older[section.name]()


def is_here(device: torch.device) -> bool:
    """Return whether this machine has the device."""
    return device.type != "cuda" or (device.index or 0) < torch.cuda.device_count()


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # torch knows more kinds of devices than are tested here.
    allowed = "allowed: auto, cpu, cuda, cuda:1, ..."
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f'base.device: "{name}" is no device; {allowed}') from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f'base.device: "{name}" is not supported; {allowed}')
    if not is_here(device):
        raise UserError(
            f'base.device: "{name}" is not on this machine '
            f'({torch.cuda.device_count()} CUDA devices); choose another, or "auto"'
        )
    return device


def _attention(section: BaseSection, model: Any, device: torch.device) -> str:
    """Return how attention is computed. Raises UserError where that would leave a cap out."""
    if getattr(model.config, "attn_logit_softcapping", None) is None:
        return _fastest(device) if section.attention == "auto" else section.attention
    # torch's own attention has no cap, and transformers would leave it out.
    if section.attention == "sdpa":
        raise UserError(
            f'base.attention: given "sdpa", which has no cap on its scores, and base '
            f"{section.name} has one (attn_logit_softcapping); allowed: auto, eager"
        )
    return "eager"


def _fastest(device: torch.device) -> str:
    if device.type != "cpu":
        return "sdpa"
    # Where nothing can be compiled: torch's own has a slow backward pass there (LOG.md).
    return "eager" if csrc.library() is None else attention.register()


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        return getattr(torch, name)  # type: ignore[no-any-return]
    return torch.bfloat16 if fast_at_bfloat16(device) else torch.float32


def _fingerprint(model: Any, encoder: TextEncoder) -> str:
    digest = hashlib.sha256(encoder.id.encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
