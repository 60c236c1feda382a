"""A tokenizer as llama.cpp reads it: the vocabulary, the merges, and the name of its rule.

llama.cpp has the rules that cut text into words built in, by name. The name is found from the
tokenizer's own rule, never from a model's name, so that a file says what its numbers were trained
with.
"""

from __future__ import annotations

import json
from typing import Any

import gguf

from comigs.errors import UserError

INSTEAD = 'what does work: "transformers", "peft" and "flat"'
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
RULES = {  # kinds of the steps that cut text, with what they cut by -> llama.cpp's name
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (LLAMA3, "ByteLevel"): "llama-bpe",
    (QWEN2, "ByteLevel"): "qwen2",
}


def rule_of(tokenizer: Any) -> str:
    """Return llama.cpp's name for a tokenizer's rule. Raises UserError where it has none."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    step = described["pre_tokenizer"] or {"type": "none"}
    steps = step["pretokenizers"] if step["type"] == "Sequence" else [step]
    name = RULES.get(tuple(map(_kind, steps)))
    model = described["model"]
    if name is None or model["type"] != "BPE" or not model["merges"]:
        found = ", ".join(str(step["type"]) for step in steps)
        raise UserError(
            f"the tokenizer cuts text in a way ({model['type']}, {found}) for which no name of "
            f"llama.cpp's is known here; {INSTEAD}"
        )
    return name


def _kind(step: dict[str, Any]) -> str:
    """Return what one step cuts by."""
    if step["type"] == "Split":
        return str(step["pattern"].get("Regex"))
    if step["type"] == "Digits" and not step["individual_digits"]:
        return "Digits in groups"
    if step["type"] == "ByteLevel" and step["add_prefix_space"]:
        return "ByteLevel with a space before"
    return str(step["type"])


def add_tokenizer(writer: Any, tokenizer: Any, vocabulary_size: int) -> None:
    """Write a tokenizer's keys. Numbers that the model has and the tokenizer lacks are unused."""
    # Numbers without a token keep a name of their own, as llama.cpp wants one for each.
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = [f"[PAD{number}]" for number in range(vocabulary_size)]
    kinds = [gguf.TokenType.UNUSED] * vocabulary_size
    for token, number in described["model"]["vocab"].items():
        tokens[number], kinds[number] = token, gguf.TokenType.NORMAL
    for added in described["added_tokens"]:
        special = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], kinds[added["id"]] = added["content"], special
    # Older files have a merge as one text, newer ones as a pair.
    merges = []
    for merge in described["model"]["merges"]:
        merges.append(merge if isinstance(merge, str) else " ".join(merge))

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule_of(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    # Text is read as the run read it: nothing is put before it.
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    # Special tokens that a tokenizer does not have are left to llama.cpp.
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.eos_token_id is not None:
        writer.add_eos_token_id(tokenizer.eos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
