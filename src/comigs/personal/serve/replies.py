"""The JSON of OpenAI's API: whole answers, chunks of a stream, models, errors."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from comigs.personal.serve.jobs import Failure, Piece, TokenInfo
from comigs.personal.serve.text import Vocabulary

KINDS = {400: "invalid_request_error", 401: "authentication_error", 429: "rate_limit_error"}


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return an error as OpenAI's clients read it."""
    kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def failure_body(failure: Failure) -> dict[str, Any]:
    """Return a failure of the scheduler as an error."""
    return error_body(failure.status, failure.message, code=failure.code)


@dataclass
class Choice:
    """One choice of a whole answer, as its pieces come."""

    text: str = ""
    tokens: list[TokenInfo] = field(default_factory=list)
    num_tokens: int = 0
    finish: str | None = None

    def add(self, piece: Piece) -> None:
        """Add what is new."""
        self.text += piece.text
        self.tokens += piece.tokens
        self.num_tokens = piece.num_tokens
        self.finish = piece.finish


class Replies:
    """The answers to one request. chat: it came to /v1/chat/completions. wants_logprobs: tell
    them.
    """

    def __init__(
        self, model: str, chat: bool, wants_logprobs: bool, vocabulary: Vocabulary
    ) -> None:
        self.chat = chat
        self.wants_logprobs = wants_logprobs
        self.vocabulary = vocabulary
        self._head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12),
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, choices: Sequence[Choice], prompt_tokens: int) -> dict[str, Any]:
        """Return the answer at once."""
        shown = []
        for number, choice in enumerate(choices):
            text: dict[str, Any] = {"text": choice.text}
            if self.chat:
                text = {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
            logprobs = self._logprobs(choice.tokens)
            shown.append(
                {"index": number, **text, "logprobs": logprobs, "finish_reason": choice.finish}
            )
        kind = "chat.completion" if self.chat else "text_completion"
        usage = usage_of(prompt_tokens, sum(choice.num_tokens for choice in choices))
        return {**self._head, "object": kind, "choices": shown, "usage": usage}

    def first(self, choice: int) -> dict[str, Any] | None:
        """Return the chunk that says who speaks; a completion has none."""
        return (
            self._chunk(choice, {"delta": {"role": "assistant", "content": ""}}, (), None)
            if self.chat
            else None
        )

    def piece(self, piece: Piece) -> list[dict[str, Any]]:
        """Return the chunks for a piece of the answer; its end is in a chunk of its own."""
        chunks = []
        if piece.text or piece.tokens:
            text = {"delta": {"content": piece.text}} if self.chat else {"text": piece.text}
            chunks.append(self._chunk(piece.choice, text, piece.tokens, None))
        if piece.finish is not None:
            empty: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
            chunks.append(self._chunk(piece.choice, empty, (), piece.finish))
        return chunks

    def usage(self, prompt_tokens: int, answer_tokens: int) -> dict[str, Any]:
        """Return the last chunk of a stream that asked for it."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {
            **self._head,
            "object": kind,
            "choices": [],
            "usage": usage_of(prompt_tokens, answer_tokens),
        }

    def _chunk(
        self, choice: int, text: dict[str, Any], tokens: Sequence[TokenInfo], finish: str | None
    ) -> dict[str, Any]:
        logprobs = self._logprobs(tokens) if tokens else None
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        entry = {"index": choice, **text, "logprobs": logprobs, "finish_reason": finish}
        return {**self._head, "object": kind, "choices": [entry]}

    def _logprobs(self, tokens: Sequence[TokenInfo]) -> dict[str, Any] | None:
        if not self.wants_logprobs:
            return None
        if self.chat:
            return {"content": [self._entry(t) for t in tokens], "refusal": None}
        tops = []
        for token in tokens:
            tops.append({self.vocabulary.name_of(id): logprob for id, logprob in token.top})
        return {
            "tokens": [self.vocabulary.name_of(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": tops,
            "text_offset": [token.offset for token in tokens],
        }

    def _entry(self, token: TokenInfo) -> dict[str, Any]:
        top = [self._named(id, logprob) for id, logprob in token.top]
        return {**self._named(token.id, token.logprob), "top_logprobs": top}

    def _named(self, id: int, logprob: float) -> dict[str, Any]:
        raw = self.vocabulary.bytes_of(id)
        return {"token": raw.decode(errors="replace"), "logprob": logprob, "bytes": list(raw)}


def usage_of(prompt_tokens: int, answer_tokens: int) -> dict[str, int]:
    """Return the tokens of a request. What ends a text is no token of the answer."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": answer_tokens,
        "total_tokens": prompt_tokens + answer_tokens,
    }
