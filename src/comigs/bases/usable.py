"""This module says which models experts can be put on, and which tokenizers can feed them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from comigs.bases.base import Architecture
from comigs.bases.chat_tokens import TemplateTokens
from comigs.bases.pretrained import cannot_load

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def require_usable(model: Any, tokenizer: Any, architecture: Architecture) -> None:
    """Refuse a base that would fail later, or compute something else. Raises UserError."""
    _require_linears(model, architecture)
    _require_tokenizer(model.name_or_path, tokenizer)
    rows, highest = model.get_input_embeddings().weight.shape[0], highest_id(tokenizer)
    if highest >= rows:
        token = tokenizer.convert_ids_to_tokens(highest)
        raise cannot_load(
            model.name_or_path,
            f'its tokenizer gives ids up to {highest} ("{token}"), but its embedding has {rows} '
            "rows; tokens were added without resize_token_embeddings",
        )


def _require_linears(model: Any, architecture: Architecture) -> None:
    """Refuse blocks whose linears are not linears of plain numbers. Raises UserError."""
    if getattr(model, "_hf_peft_config_loaded", False) or getattr(model, "hf_quantizer", None):
        raise cannot_load(
            model.name_or_path, "it has an adapter on it or is quantised; give the plain model"
        )
    # One that is packed or wrapped computes, too, but gives experts nothing to train through.
    for number, block in enumerate(model.get_submodule(architecture.blocks)):
        mlp = [f"{architecture.mlp}.{name}" for name in architecture.mlp_linears().values()]
        for path in [*mlp, *architecture.attention.values()]:
            try:
                linear = block.get_submodule(path)
            except AttributeError:
                raise cannot_load(model.name_or_path, f"its block {number} has no {path}") from None
            if not isinstance(linear, nn.Linear | Conv1D) or linear.weight.dtype not in FLOATS:
                weight = getattr(linear, "weight", None)
                dtype = weight.dtype if isinstance(weight, Tensor) else "unknown numbers"
                kind = f"{type(linear).__name__} of {dtype}"
                raise cannot_load(
                    model.name_or_path,
                    f"{architecture.blocks}.{number}.{path} is no linear of plain numbers "
                    f"({kind}); experts cannot be put on it",
                )


def _require_tokenizer(name: str, tokenizer: Any) -> None:
    """Refuse a tokenizer that cannot make a stream of documents. Raises UserError."""
    kind = type(tokenizer).__name__
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise cannot_load(
            name,
            f"its tokenizer ({kind}) is written in Python alone; a fast one (tokenizer.json) is "
            "needed",
        )
    if tokenizer.eos_token_id is None and tokenizer.bos_token_id is None:
        raise cannot_load(
            name,
            "its tokenizer has no token that ends or begins a text, and documents are separated "
            'by it; name one in its tokenizer_config.json, as {"eos_token": "</s>"}',
        )


def highest_id(tokenizer: Any) -> int:
    """Return the highest id that text, or the separator, can become.

    Special tokens are no text: some tokenizers have them for what the model does not read.
    """
    # The count of tokens says less: ids may have holes.
    added = tokenizer.added_tokens_decoder
    special = {id for id, token in added.items() if token.special}
    ids = [id for id in tokenizer.get_vocab().values() if id not in special]
    highest: int = max([*ids, separator(tokenizer)])
    return highest


def end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end a text: the base's own, the tokenizer's and the template's."""
    own = model.generation_config.eos_token_id
    listed = own if isinstance(own, list) else [own]
    # A template may close an answer with a token that neither knows of.
    if tokenizer.chat_template:
        listed = [*listed, TemplateTokens(tokenizer).end]
    return frozenset(id for id in [*listed, tokenizer.eos_token_id] if id is not None)


def separator(tokenizer: Any) -> int:
    """Return the id before each document: the end of text, else its beginning."""
    end = tokenizer.eos_token_id
    found: int = tokenizer.bos_token_id if end is None else end
    return found
