"""From a conversation to the tokens that a base reads: by its chat template, or as one text where
it has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comigs.bases.chat_template import Message, TemplateRefusal
from comigs.bases.chat_tokens import prompt_ids
from comigs.bases.usable import separator
from comigs.errors import UserError


def conversation_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Return the tokens after which the assistant's next words come. Raises UserError where the
    template refuses.
    """
    if not tokenizer.chat_template:
        return text_ids(tokenizer, plain_text(messages))
    try:
        return prompt_ids(tokenizer, messages)
    except TemplateRefusal as error:
        raise UserError(f"messages: the base's chat template refuses them: {error}") from None


def plain_text(messages: Sequence[Message]) -> str:
    """Return a conversation as one text to go on from.

    An answer is the continuation of the text before it, so nothing stands between them; whatever is
    not an answer begins on a line of its own.
    """
    text = ""
    for message in messages:
        between = "\n" if text and message["role"] != "assistant" else ""
        text += between + message["content"]
    return text


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text to go on from; of an empty one, the token that stands before each
    document.
    """
    if not text:
        return [separator(tokenizer)]
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def unread(model: Any, tokenizer: Any, ids: Sequence[int]) -> str | None:
    """Return the text of a token that the base has no row for; None where it reads them all.

    A tokenizer may have special tokens for what another model of its family reads, as images.
    """
    rows = model.get_input_embeddings().num_embeddings
    for id in ids:
        if id >= rows:
            return str(tokenizer.convert_ids_to_tokens(id))
    return None
