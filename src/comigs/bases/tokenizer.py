"""What the data floor needs of a tokenizer: token ids, a separator, and an identity."""

from __future__ import annotations

import hashlib
from typing import Any


class TextEncoder:
    """A `transformers` fast tokenizer as the data floor's Encoder.

    id: sha256 of the whole tokenizer, so that a token store is never read with another one.
    separator: the token before each document and at the end (the tokenizer's end of text).
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.id = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
        self.vocabulary_size = len(tokenizer)
        self.separator = int(
            tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
        )

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text. Special tokens written out in a user's text stay text."""
        batch = self.tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        return batch["input_ids"]  # type: ignore[no-any-return]
