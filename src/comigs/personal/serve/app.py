"""The web application: OpenAI's paths, who may use them, and errors in OpenAI's shape."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from comigs.personal.serve.answers import Answer, Bounds, EventStream, Failed, prompts_of
from comigs.personal.serve.jobs import Failure, Refused
from comigs.personal.serve.keys import Keys, is_loopback
from comigs.personal.serve.packed import PackedClient
from comigs.personal.serve.replies import Replies, error_body, failure_body
from comigs.personal.serve.scheduler import Scheduler
from comigs.personal.serve.schema import BadRequest, ChatRequest, CompletionRequest, parse

BODY_SECONDS = 30  # for the body of a request to arrive


@dataclass(frozen=True)
class Served:
    """A client's model as the server offers it. created: seconds since 1970."""

    client: PackedClient
    created: int

    def described(self) -> dict[str, Any]:
        """Return the entry of /v1/models."""
        return {
            "id": self.client.name,
            "object": "model",
            "created": self.created,
            "owned_by": "comigs",
        }


class Api:
    """The paths of the server. models: id -> model. keys: None where everybody on this machine may
    use all models.
    """

    def __init__(
        self,
        models: Mapping[str, Served],
        scheduler: Scheduler,
        bounds: Bounds,
        keys: Keys | None = None,
    ) -> None:
        self.models = models
        self.scheduler = scheduler
        self.bounds = bounds
        self.keys = keys
        self._reader = ThreadPoolExecutor(1)  # one: reading a prompt changes the tokenizer

    def application(self) -> Starlette:
        """Return the ASGI application."""
        routes = [
            Route("/health", self.health, methods=["GET"]),
            Route("/v1/models", self.list_models, methods=["GET"]),
            Route("/v1/models/{model:path}", self.show_model, methods=["GET"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
        ]
        handlers: dict[Any, Any] = {
            HTTPException: _http_error,
            BadRequest: _bad_request,
            Exception: _bug,
        }
        return Starlette(routes=routes, exception_handlers=handlers)

    async def health(self, request: Request) -> Response:
        """Say that the server answers, to anybody; nothing about the models."""
        return JSONResponse({"status": "ok"})

    async def list_models(self, request: Request) -> Response:
        """List the models that the caller may use."""
        models = self._open_to(request)
        return JSONResponse(
            {"object": "list", "data": [model.described() for model in models.values()]}
        )

    async def show_model(self, request: Request) -> Response:
        """Describe one model."""
        return JSONResponse(
            _named(self._open_to(request), request.path_params["model"]).described()
        )

    async def chat(self, request: Request) -> Response:
        """Answer POST /v1/chat/completions."""
        return await self._answer(request, ChatRequest)

    async def complete(self, request: Request) -> Response:
        """Answer POST /v1/completions."""
        return await self._answer(request, CompletionRequest)

    async def _answer(
        self, request: Request, kind: type[ChatRequest] | type[CompletionRequest]
    ) -> Response:
        # Who asks comes first: a stranger's body is not even read.
        models = self._open_to(request)
        asked = parse(kind, await self._json(request))
        client = _named(models, asked.model).client
        # What cannot be done is said before anything is queued, and before prompts are read.
        limits = self.scheduler.limits
        if isinstance(asked, CompletionRequest) and len(asked.prompts()) > limits.queue:
            raise BadRequest(f"prompt: must be {limits.queue} prompts or fewer", "prompt")
        if asked.n > limits.rows:
            raise BadRequest(f"n: must be {limits.rows} or less", "n")
        # a template may take long over a long conversation
        base, loop = self.scheduler.model.base, asyncio.get_running_loop()
        prompts = await loop.run_in_executor(self._reader, prompts_of, asked, base, self.bounds)
        answer = Answer(asked, client, prompts, self.bounds)
        replies = Replies(
            asked.model, kind is ChatRequest, _wants_logprobs(asked), self.scheduler.vocabulary
        )
        try:
            answer.submit(self.scheduler)
        except Refused as refused:
            return _failure(refused.failure)
        if asked.stream:
            return EventStream(answer, replies)
        return await self._whole(request, answer, replies)

    async def _whole(self, request: Request, answer: Answer, replies: Replies) -> Response:
        """Wait for the end of an answer, or of the connection, whichever comes first."""
        writing = asyncio.create_task(answer.whole(replies))
        leaving = asyncio.create_task(_gone(request))
        # A client that leaves frees its rows for others at once.
        try:
            await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not writing.done():
                raise ClientDisconnect
            return JSONResponse(writing.result())
        except Failed as failed:
            return _failure(failed.failure)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        finally:
            answer.cancel()
            for task in (writing, leaving):
                task.cancel()
            await asyncio.gather(writing, leaving, return_exceptions=True)

    def _open_to(self, request: Request) -> Mapping[str, Served]:
        """Return the models that the caller may use. Raises HTTPException for a stranger."""
        if self.keys is None:
            # A page in this machine's browser may reach us under a name of its own; it is not who
            # we serve.
            if not is_loopback(request.url.hostname or ""):
                raise HTTPException(403, "without keys, this server answers to localhost only")
            return self.models
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        model = self.keys.opens(key.strip()) if scheme.lower() == "bearer" else None
        if model is None:
            raise HTTPException(
                401, "the API key is missing or wrong", {"WWW-Authenticate": "Bearer"}
            )
        return {model: self.models[model]}

    async def _json(self, request: Request) -> object:
        """Read the body, no more than is allowed. Raises BadRequest and HTTPException."""
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise HTTPException(415, "the Content-Type must be application/json")
        # It is counted as it comes: a header may say anything, or nothing.
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for piece in request.stream():
                    body += piece
                    if len(body) > self.bounds.body:
                        raise HTTPException(
                            413, f"the body must have {self.bounds.body} bytes or less"
                        )
        except TimeoutError:
            raise HTTPException(
                408, f"the body must arrive within {BODY_SECONDS} seconds"
            ) from None
        except ClientDisconnect:
            raise HTTPException(400, "the body did not arrive") from None
        # JSON as it is defined: no NaN, no half of a surrogate pair, no endless nesting.
        try:
            return from_json(bytes(body), allow_inf_nan=False)
        except ValueError as error:
            raise BadRequest(f"the body is no JSON: {error}") from None


def _named(models: Mapping[str, Served], name: str) -> Served:
    """Return a model by its id. What belongs to others is as unknown as what does not exist. Raises
    BadRequest.
    """
    if name not in models:
        raise BadRequest(
            f'model: "{name}" does not exist, or the key does not open it',
            "model",
            "model_not_found",
        )
    return models[name]


def _wants_logprobs(asked: ChatRequest | CompletionRequest) -> bool:
    return asked.logprobs if isinstance(asked, ChatRequest) else asked.logprobs is not None


async def _gone(request: Request) -> None:
    """Wait until the client has left."""
    with contextlib.suppress(ClientDisconnect):
        while (await request.receive())["type"] != "http.disconnect":
            pass


def _failure(failure: Failure) -> Response:
    # OpenAI's client asks again by itself, which is of use where the server was busy and of none
    # where it was slow.
    again = {"x-should-retry": "true" if failure.status == 429 else "false"}
    return JSONResponse(failure_body(failure), failure.status, again)


async def _bad_request(request: Request, error: BadRequest) -> Response:
    status = 404 if error.code == "model_not_found" else 400
    return JSONResponse(error_body(status, str(error), error.param, error.code), status)


async def _http_error(request: Request, error: HTTPException) -> Response:
    codes = {
        401: "invalid_api_key",
        404: "not_found",
        405: "method_not_allowed",
        413: "body_too_large",
    }
    body = error_body(error.status_code, error.detail, code=codes.get(error.status_code))
    return JSONResponse(body, error.status_code, error.headers)


async def _bug(request: Request, error: Exception) -> Response:
    return JSONResponse(
        error_body(500, "a bug of the server; its log has more", code="internal_error"), 500
    )
