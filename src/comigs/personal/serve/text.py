"""From token ids to text that can be sent: whole characters only, and nothing that may be the start
of a stop text.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from comigs.personal.serve.jobs import Piece, TokenInfo

BYTE = re.compile(r"<0x([0-9A-F]{2})>")
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # as tokenizers of the SentencePiece kind write a space


class Vocabulary:
    """The bytes of each token, so that characters that span tokens can be put together."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self.added = {id: str(token) for id, token in added.items()}
        # A tokenizer's own list of special tokens has those alone that it has a use for itself.
        self.special = {id for id, token in added.items() if token.special}
        is_of_bytes = "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder)
        self.byte_of = _bytes_of_characters() if is_of_bytes else None
        self._known: dict[int, bytes] = {}

    def bytes_of(self, id: int) -> bytes:
        """Return the bytes that a token writes; those of its name for a special token."""
        if id not in self._known:
            self._known[id] = self._look_up(id)
        return self._known[id]

    def name_of(self, id: int) -> str:
        """Return a token alone as text, or its bytes as OpenAI writes those that are no whole
        character.
        """
        raw = self.bytes_of(id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _look_up(self, id: int) -> bytes:
        if id in self.added:
            return self.added[id].encode()
        token = self.tokenizer.convert_ids_to_tokens(id)
        if token is None:  # a row of the embedding that no token has
            return b""
        if self.byte_of is not None and all(character in self.byte_of for character in token):
            return bytes(self.byte_of[character] for character in token)
        if match := BYTE.fullmatch(token):
            return bytes([int(match[1], 16)])
        return str(token).replace(SPACE, " ").encode()


def _bytes_of_characters() -> dict[str, int]:
    """Return GPT-2's alphabet: the character that stands for each byte -> the byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + number): byte for number, byte in enumerate(others)}


class Transcript:
    """The text of one choice as it is written."""

    def __init__(self, vocabulary: Vocabulary, choice: int, stop: Sequence[str]) -> None:
        self.vocabulary = vocabulary
        self.choice = choice
        self.stop = stop
        self.text = ""
        self.num_tokens = 0
        self._sent = 0  # characters of `text` that are in a piece already
        self._held: list[TokenInfo] = []  # that are in no piece yet
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int, info: TokenInfo | None) -> Piece:
        """Add a token; return what can be sent now. The piece is the last one where a stop text is
        complete.
        """
        # A special token is no text, and yet what people name as a stop text.
        is_special = token in self.vocabulary.special
        if is_special and self.vocabulary.added[token] in self.stop:
            return self.end("stop")
        self.num_tokens += 1
        if info is not None:
            self._held.append(replace(info, offset=len(self.text)))
        if not is_special:
            self.text += self._decoder.decode(self.vocabulary.bytes_of(token))
        return self._piece()

    def end(self, finish: str) -> Piece:
        """Return what was held back. It may complete a stop text: bytes that never became a
        character count now.
        """
        self.text += self._decoder.decode(b"", final=True)
        piece = self._piece()
        if piece.finish is not None:
            return piece
        rest = self._take(len(self.text), finish)
        return replace(rest, text=piece.text + rest.text, tokens=piece.tokens + rest.tokens)

    def _piece(self) -> Piece:
        found = [at for word in self.stop if (at := self.text.find(word, self._sent)) >= 0]
        if found:
            return self._take(min(found), "stop")
        return self._take(len(self.text) - self._possible_stop(), None)

    def _possible_stop(self) -> int:
        """Return how many of the last characters may be the start of a stop text."""
        longest = 0
        for word in self.stop:
            for length in range(min(len(word) - 1, len(self.text) - self._sent), longest, -1):
                if self.text.endswith(word[:length]):
                    longest = length
                    break
        return longest

    def _take(self, until: int, finish: str | None) -> Piece:
        """Return the characters up to `until` with their tokens; without a stop text, the last
        piece has all tokens.
        """
        everything = finish is not None and until == len(self.text)
        ready = [info for info in self._held if info.offset < until or everything]
        self._held = self._held[len(ready) :]
        text, self._sent = self.text[self._sent : until], until
        return Piece(self.choice, text, tuple(ready), self.num_tokens, finish)
