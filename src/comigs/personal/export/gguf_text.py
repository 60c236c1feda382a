"""A tokenizer as llama.cpp reads it: the vocabulary, the merges, and the name of its rule.

llama.cpp has the rules that cut text into words built in, by name. The name is found from the
tokenizer's own rule, never from a model's name, so that a file says what its numbers were trained
with.
"""

from __future__ import annotations

import json
from typing import Any

import gguf

from comigs.bases.text_rules import LLAMA3, QWEN2
from comigs.errors import UserError
from comigs.personal.export.gguf_tensors import INSTEAD

RULES = {  # kinds of the steps that cut text, with what they cut by -> llama.cpp's name
    ("ByteLevel by words",): "gpt-2",
    ("Digits", "ByteLevel by words"): "smollm",
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
    # What a tokenizer does to text before it is cut is no part of the rule, and llama.cpp lacks it.
    if (change := _change_of(described)) not in (None, "NFC"):
        raise UserError(
            f"the tokenizer changes text before it cuts it ({change}), which llama.cpp does not "
            f"do; {INSTEAD}"
        )
    if name is None or model["type"] != "BPE" or not model["merges"]:
        found = ", ".join(str(step["type"]) for step in steps)
        raise UserError(
            f"the tokenizer cuts text in a way ({model['type']}, {found}) for which no name of "
            f"llama.cpp's is known here; {INSTEAD}"
        )
    return name


def notes_on(tokenizer: Any) -> list[str]:
    """Say what of a tokenizer llama.cpp does not do, and its user has to."""
    if _change_of(json.loads(tokenizer.backend_tokenizer.to_str())) is None:
        return []
    return [
        "The run's tokenizer puts letters and their accents together (Unicode NFC), and llama.cpp "
        "does not: give it text in that form, as keyboards write it."
    ]


def _change_of(described: dict[str, Any]) -> str | None:
    """Return what a tokenizer does to a text before it is cut; None where it does nothing."""
    step = described["normalizer"]
    if step is None:
        return None
    steps = step["normalizers"] if step["type"] == "Sequence" else [step]
    return ", ".join(str(step["type"]) for step in steps) or None


def _kind(step: dict[str, Any]) -> str:
    """Return what one step cuts by."""
    if step["type"] == "Split":
        return str(step["pattern"].get("Regex"))
    if step["type"] == "Digits" and not step["individual_digits"]:
        return "Digits in groups"
    if step["type"] == "ByteLevel" and step["add_prefix_space"]:
        return "ByteLevel with a space before"
    if step["type"] == "ByteLevel" and step["use_regex"]:
        return "ByteLevel by words"
    return str(step["type"])


def add_tokenizer(writer: Any, tokenizer: Any, vocabulary_size: int, ends: Any) -> None:
    """Write a tokenizer's keys. Numbers that the model has and the tokenizer lacks are unused.

    ends: the tokens that end a text.
    """
    # Numbers without a token keep a name of their own, as llama.cpp wants one for each.
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = [f"[PAD{number}]" for number in range(vocabulary_size)]
    kinds = [gguf.TokenType.UNUSED] * vocabulary_size
    for token, number in described["model"]["vocab"].items():
        tokens[number], kinds[number] = token, gguf.TokenType.NORMAL
    # A token that the model does not read, as one for images, is text to llama.cpp.
    for added in described["added_tokens"]:
        if added["id"] >= vocabulary_size:
            continue
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
    # A model may end a text in several ways, as a turn and as a document.
    others = sorted(ends - {tokenizer.eos_token_id})
    for add, number in zip(
        (writer.add_eot_token_id, writer.add_eom_token_id), others, strict=False
    ):
        add(number)
    # Of several templates, that of a plain conversation is the one without a name.
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        writer.add_chat_template(template)
