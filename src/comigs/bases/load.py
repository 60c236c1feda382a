"""From a name to a frozen model, its tokenizer and where experts go in it."""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from comigs import bases
from comigs.bases.base import Architecture
from comigs.bases.tokenizer import TextEncoder
from comigs.config import BaseSection
from comigs.errors import UserError, nearest


@dataclass(frozen=True)
class Base:
    """A frozen model, held once however many clients and experts there are.

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


def load_base(section: BaseSection) -> Base:
    """Load, freeze and place the base that the config names. Raises UserError."""
    logging.disable_progress_bar()
    device = _device(section.device)
    dtype = _dtype(section.dtype, device)
    model, tokenizer = _named(section.name)
    architecture = architecture_of(model)
    attention = (
        section.attention
        if section.attention != "auto"
        else "eager"
        if device.type == "cpu"
        else "sdpa"
    )
    model.set_attn_implementation(attention)
    model.config.pad_token_id = (
        None  # windows have no padding; else transformers warns wherever the id occurs in text
    )
    model.requires_grad_(False).eval().to(device=device, dtype=dtype)
    encoder = TextEncoder(tokenizer)
    return Base(
        section.name,
        model,
        tokenizer,
        encoder,
        architecture,
        device,
        dtype,
        _fingerprint(model, encoder),
    )


def modules() -> dict[str, ModuleType]:
    """Every file of bases/ that offers an ARCHITECTURE or a LOADERS table (name -> function), by
    file name.
    """
    found = {
        i.name: importlib.import_module(f"comigs.bases.{i.name}")
        for i in pkgutil.iter_modules(bases.__path__)
    }
    return {
        name: m for name, m in found.items() if hasattr(m, "ARCHITECTURE") or hasattr(m, "LOADERS")
    }


def loaders() -> dict[str, Callable[[], tuple[Any, Any]]]:
    """The bases that go by a name of ours."""
    return {
        name: load for m in modules().values() for name, load in getattr(m, "LOADERS", {}).items()
    }


def architecture_of(model: Any) -> Architecture:
    """The record that fits a loaded model. Raises UserError naming the families there are."""
    records: list[Architecture] = [
        m.ARCHITECTURE for m in modules().values() if hasattr(m, "ARCHITECTURE")
    ]
    model_type = model.config.model_type
    for record in records:
        if model_type in record.model_types:
            return record
    known = ", ".join(sorted(t for r in records for t in r.model_types))
    raise UserError(
        f'base: the model family "{model_type}" is not known; known: {known} (CONTRIBUTING.md: add a base)'
    )


def _named(name: str) -> tuple[Any, Any]:
    """Our own names first, then a local folder, then the hub (or its local cache)."""
    if name in loaders():
        return loaders()[name]()
    if not Path(name).is_dir() and not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        known = list(loaders())
        raise UserError(f'base.name: unknown base "{name}".{nearest(name, known)} Known: {", ".join(known)}; '
                        "or a local folder, or a hub name like org/model")  # fmt: skip
    try:
        return AutoModelForCausalLM.from_pretrained(
            name, use_safetensors=True
        ), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(
            f'base.name: "{name}" cannot be loaded: {str(error).splitlines()[0]}'
        ) from None


def is_here(device: torch.device) -> bool:
    """This machine has it."""
    return device.type != "cuda" or (device.index or 0) < torch.cuda.device_count()


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(
            f'base.device: "{name}" is no device; allowed: auto, cpu, cuda, cuda:1, ...'
        ) from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(
            f'base.device: "{name}" is not supported; allowed: auto, cpu, cuda, cuda:1, ...'
        )
    if not is_here(device):
        raise UserError(
            f'base.device: "{name}" is not on this machine ({torch.cuda.device_count()} CUDA devices); choose another, '
            'or "auto"'
        )
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        return getattr(torch, name)  # type: ignore[no-any-return]
    fast = (
        torch.cuda.is_bf16_supported()
        if device.type == "cuda"
        else torch.cpu._is_avx512_bf16_supported()
    )
    return torch.bfloat16 if fast else torch.float32


def _fingerprint(model: Any, encoder: TextEncoder) -> str:
    digest = hashlib.sha256(encoder.id.encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
