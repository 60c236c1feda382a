"""One request on its way: from what was asked to jobs, and from their events to a reply."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from comigs.bases.load import Base
from comigs.errors import UserError
from comigs.personal.prompts import conversation_ids, text_ids, unread
from comigs.personal.serve.jobs import Event, Failure, Job, Piece, Settings
from comigs.personal.serve.packed import PackedClient
from comigs.personal.serve.replies import Choice, Replies, failure_body
from comigs.personal.serve.scheduler import Scheduler
from comigs.personal.serve.schema import BadRequest, ChatRequest, CompletionRequest

SHORT_ANSWER = 16  # tokens of a completion that says nothing of its length, as OpenAI has it


@dataclass(frozen=True)
class Bounds:
    """These bounds hold for each request.

    context: tokens of a prompt and its answer together. body: bytes. seconds: from its arrival to
    its end.
    """

    context: int
    body: int = 2**18
    seconds: float = 300.0


class Failed(Exception):
    """The scheduler ended a job before its end."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def prompts_of(
    asked: ChatRequest | CompletionRequest, base: Base, bounds: Bounds
) -> list[list[int]]:
    """Return the token ids of every prompt of a request. Raises BadRequest."""
    tokenizer = base.tokenizer
    if isinstance(asked, ChatRequest):
        field, messages = "messages", [message.plain() for message in asked.messages]
        try:
            prompts = [conversation_ids(tokenizer, messages)]
        except UserError as error:
            raise BadRequest(str(error), field) from None
    else:
        field, prompts = "prompt", []
        for prompt in asked.prompts():
            prompts.append(text_ids(tokenizer, prompt) if isinstance(prompt, str) else prompt)
    # Ids may come from the request itself, and an embedding has no row for others.
    last = len(tokenizer) - 1
    for prompt in prompts:
        if not prompt or min(prompt) < 0 or max(prompt) > last:
            raise BadRequest(f"{field}: needs token ids from 0 to {last}, at least one", field)
        if token := unread(base.model, tokenizer, prompt):
            raise BadRequest(f'{field}: holds "{token}", which this base does not read', field)
        if len(prompt) >= bounds.context:
            raise BadRequest(
                f"{field}: {len(prompt)} tokens, and a prompt and its answer have room for "
                f"{bounds.context} together",
                field,
                "context_length_exceeded",
            )
    return prompts


def settings_of(asked: ChatRequest | CompletionRequest, room: int) -> Settings:
    """Return how an answer is written. room: tokens that the prompt leaves it."""
    if isinstance(asked, ChatRequest):
        wanted = asked.max_completion_tokens or asked.max_tokens or room
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    else:
        wanted = asked.max_tokens or SHORT_ANSWER
        logprobs = asked.logprobs
    return Settings(
        min(wanted, room), asked.temperature, asked.top_p, asked.seed, asked.stops(), logprobs
    )


class Answer:
    """The jobs of one request, and the queue in which their events come back to the event loop."""

    def __init__(
        self,
        asked: ChatRequest | CompletionRequest,
        client: PackedClient,
        prompts: Sequence[list[int]],
        bounds: Bounds,
    ) -> None:
        self.asked = asked
        self.prompt_tokens = sum(len(prompt) for prompt in prompts)
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.deadline = time.monotonic() + bounds.seconds
        # The scheduler's thread tells the event loop, which may have ended meanwhile.
        loop = asyncio.get_running_loop()

        def deliver(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self.events.put_nowait, event)

        # Choices are numbered through all prompts, as OpenAI's API has it.
        self.jobs = []
        for number, prompt in enumerate(prompts):
            choices = range(number * asked.n, (number + 1) * asked.n)
            settings = settings_of(asked, bounds.context - len(prompt))
            self.jobs.append(Job(client, prompt, settings, choices, self.deadline, deliver))
        self.num_choices = len(prompts) * asked.n

    def submit(self, scheduler: Scheduler) -> None:
        """Ask for all of it. Raises Refused."""
        scheduler.submit(self.jobs)

    def cancel(self) -> None:
        """Say that nobody waits for the rest; the rows are free before the next pass."""
        for job in self.jobs:
            job.cancelled = True

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield the pieces of all choices as they come, until each has ended. Raises Failed."""
        left = self.num_choices
        while left:
            event = await self.events.get()
            if isinstance(event, Failure):
                raise Failed(event)
            left -= event.finish is not None
            yield event

    async def whole(self, replies: Replies) -> dict[str, Any]:
        """Return the answer at once. Raises Failed."""
        choices = [Choice() for _ in range(self.num_choices)]
        async for piece in self.pieces():
            choices[piece.choice].add(piece)
        return replies.whole(choices, self.prompt_tokens)

    async def stream(self, replies: Replies) -> AsyncIterator[str]:
        """Yield the answer as server-sent events."""
        options = self.asked.stream_options
        num_tokens = [0] * self.num_choices
        try:
            for choice in range(self.num_choices):
                if first := replies.first(choice):
                    yield _event(first)
            async for piece in self.pieces():
                num_tokens[piece.choice] = piece.num_tokens
                for chunk in replies.piece(piece):
                    yield _event(chunk)
            # The end is told only once, after every choice has ended.
            if options is not None and options.include_usage:
                yield _event(replies.usage(self.prompt_tokens, sum(num_tokens)))
            yield "data: [DONE]\n\n"
        except Failed as failed:  # the status is sent already, so the error comes as an event
            yield _event(failure_body(failed.failure))
        finally:
            self.cancel()


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


class EventStream(StreamingResponse):
    """Server-sent events that end at a deadline, read or not: somebody who does not read must not
    stay for ever.
    """

    def __init__(self, answer: Answer, replies: Replies) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(answer.stream(replies), headers=headers, media_type="text/event-stream")
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        # The scheduler ends an answer at its deadline and says so; a moment later nobody is
        # reading.
        left = self.answer.deadline - time.monotonic() + 2
        try:
            async with asyncio.timeout(left):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            pass
        finally:
            self.answer.cancel()
