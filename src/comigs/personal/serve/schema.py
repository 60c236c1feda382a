"""The requests of OpenAI's API that we answer, and what is wrong with others, with the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

MAX_STOPS = 4
MAX_MISTAKES = 1000  # that are looked at for the one to name: each takes pydantic long to tell
IGNORED = (  # what says who asks or how to store it; it changes no answer
    "user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier",
)  # fmt: skip
NEUTRAL: Mapping[str, Any] = {  # what we cannot do, with the one value that asks for nothing
    "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "best_of": 1,
    "echo": False, "suffix": "", "tools": [], "functions": [], "tool_choice": "none",
    "function_call": "none", "parallel_tool_calls": True, "response_format": {"type": "text"},
    "modalities": ["text"], "reasoning_effort": "none",
}  # fmt: skip
ROLES = {"developer": "system"}  # OpenAI's newer word for it


class BadRequest(Exception):
    """A request that cannot be answered: what is wrong, the field, and a code of OpenAI's."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class Part(BaseModel):
    """A part of a message. Only text is read."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        # an answer that comes back in a conversation has null for what it has not
        if not isinstance(given, dict):
            return given
        return {key: value for key, value in given.items() if value is not None or key == "content"}

    def plain(self) -> dict[str, str]:
        """Return the role and the text alone."""
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        return {"role": ROLES.get(self.role, self.role), "content": content}


class StreamOptions(BaseModel):
    """What a stream has beside the answer."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False
    include_obfuscation: bool = False


class Request(BaseModel):
    """What both kinds of requests have."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1)] = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        words = [stop] if isinstance(stop, str) else stop or []
        if len(words) > MAX_STOPS or not all(words):
            raise ValueError(f"must be a text or up to {MAX_STOPS} of them, none empty")
        return stop

    def stops(self) -> tuple[str, ...]:
        """Return the texts before which an answer ends."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatRequest(Request):
    """This is the body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs = true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens: give it or max_completion_tokens, not both")
        return self


class CompletionRequest(Request):
    """This is the body of POST /v1/completions.

    prompt: a text, several, the token ids of one, or of several.
    """

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    def prompts(self) -> list[str] | list[list[int]]:
        """Return every prompt, as text or as token ids. Raises BadRequest where there is none."""
        given: Any = self.prompt
        found = (
            [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
        )
        if not found:
            raise BadRequest("prompt: must not be an empty list", "prompt")
        return found


Asked = TypeVar("Asked", bound=Request)


def parse(kind: type[Asked], given: object) -> Asked:
    """Read a request from what JSON held. Raises BadRequest naming the field."""
    if not isinstance(given, dict):
        raise BadRequest("the request must be a JSON object")
    fields = {
        key: value for key, value in given.items() if key not in IGNORED and value is not None
    }
    for key, neutral in NEUTRAL.items():
        if key in fields and key not in kind.model_fields and fields.pop(key) != neutral:
            raise BadRequest(
                f"{key}: this server does not do that; leave it out", key, "unsupported_parameter"
            )
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _bad_request(error, fields) from None


def _bad_request(error: ValidationError, fields: Mapping[str, Any]) -> BadRequest:
    # Nobody else is answered while mistakes are told, and a body has room for 200,000 of them.
    if (count := error.error_count()) > MAX_MISTAKES:
        return BadRequest(f"{count:,} mistakes, too many to look for the one to name")

    # Of the types that a field may have, the one that was meant is the one that fits furthest down.
    problem = max(error.errors(include_url=False), key=lambda each: len(each["loc"]))
    message = str(problem["msg"]).removeprefix("Value error, ")
    param = _place(problem["loc"], fields, problem["type"] in ("missing", "extra_forbidden"))
    if not param:  # what two fields say together: the message begins with the field
        return BadRequest(message, message.partition(":")[0])
    return BadRequest(f"{param}: {message[:1].lower()}{message[1:]}", param)


def _place(location: tuple[int | str, ...], given: Any, keeps_last: bool) -> str:
    """Return `messages.0.content`: pydantic also names which of several types it tried, and we
    leave that out.

    keeps_last: the last part is the name of a field that is not there, or should not be.
    """
    parts = []
    for number, part in enumerate(location):
        here = isinstance(given, Mapping) and part in given
        here = here or (isinstance(given, list) and isinstance(part, int) and part < len(given))
        if here:
            given = given[part]
        if here or (keeps_last and number == len(location) - 1):
            parts.append(str(part))
    return ".".join(parts)
