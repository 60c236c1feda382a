"""This module shows a tokenizer to the data room: token ids, a separator, and an identity."""

from __future__ import annotations

import hashlib
from typing import Any

from comigs.bases.chat_encoder import ChatEncoder
from comigs.bases.usable import highest_id, separator


class TextEncoder:
    """A text encoder is a `transformers` fast tokenizer as data/corpus.py's Encoder.

    id: sha256 of the whole tokenizer, so that a token store is never read with another one.
    separator: the token before each document and at the end (the tokenizer's end of text).
    chats: what chats are encoded with.
    """

    def __init__(self, tokenizer: Any, chats: ChatEncoder) -> None:
        self.tokenizer, self.chats = tokenizer, chats
        self.id = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
        self.vocabulary_size = highest_id(tokenizer) + 1
        self.separator = separator(tokenizer)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text. Special tokens written out in a user's text stay text."""
        batch = self.tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        return batch["input_ids"]  # type: ignore[no-any-return]
