"""What the tests of chat and serve share: clients with unlike experts on one base, a scheduler, a
server in a thread.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from openai import OpenAI
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from comigs.bases.load import Base
from comigs.bases.usable import end_ids
from comigs.experts.attach import Attachment
from comigs.personal.serve.answers import Bounds
from comigs.personal.serve.app import Api, Served
from comigs.personal.serve.jobs import Event, Failure, Job, Piece, Settings, TokenInfo
from comigs.personal.serve.keys import Keys
from comigs.personal.serve.model import RowModel
from comigs.personal.serve.packed import PackedClient, pack
from comigs.personal.serve.rows import Row, make_pass
from comigs.personal.serve.scheduler import Limits, Scheduler
from comigs.personal.serve.server import Server, listen, uvicorn_settings
from comigs.personal.serve.text import Vocabulary
from tests.conftest import attach, random_tensors, shape_of, tiny

SHAPES = [
    shape_of(1, 1),
    shape_of(2, 1, rank=2),
    shape_of(1, 1, rank=4, specialist_rank=2),
    shape_of(1, 0),
]
HELLO = [{"role": "user", "content": "hello"}]
NAMES = ["run/ann", "run/bob", "run/cyd", "run/dan"]


def clients_on(base: Base, shapes: Sequence[Any] = SHAPES, **settings: Any) -> list[PackedClient]:
    """Clients far from the base and from each other. settings: of `attach`."""
    with attach(base.model, base.architecture, **settings) as attachment:
        return [client for client, _ in attached_clients(base, attachment, shapes)]


def attached_clients(
    base: Base, attachment: Attachment, shapes: Sequence[Any] = SHAPES, routed: bool = True
) -> list[tuple[PackedClient, dict[Any, Any]]]:
    """The same with the tensors that each was packed from."""
    made = []
    for number, shape in enumerate(shapes):
        tensors = random_tensors(attachment, shape, routed, seed=number, dtype=base.dtype)
        attachment.bind(tensors)
        made.append((pack(attachment, NAMES[number], number, base.dtype), tensors))
    return made


def prompt_of(number: int, length: int, vocabulary: int = 90) -> list[int]:
    """Any tokens."""
    random = torch.Generator().manual_seed(number)
    return torch.randint(3, vocabulary, (length,), generator=random).tolist()


def logits_alone(
    attachment: Attachment, tensors: Any, prompt: list[int], count: int
) -> tuple[list[int], Any]:
    """The likeliest tokens and their logits by the mixture of training, without a cache: the whole
    text each time.
    """
    attachment.bind(tensors)
    ids, logits = list(prompt), []
    for _ in range(count):
        with torch.no_grad():
            logits.append(
                attachment.model(torch.tensor([ids]), use_cache=False).logits[0, -1].float()
            )
        ids.append(int(logits[-1].argmax()))
    return ids[len(prompt) :], torch.stack(logits)


def write_together(
    model: RowModel, rows: Sequence[Row], prompts: Sequence[list[int]], count: int, chunk: int
) -> list[tuple[list[int], Any]]:
    """The likeliest tokens of rows in one batch: each joins a pass after the one before, prompts
    come in chunks.
    """
    feeds, written, logits = [list(p) for p in prompts], [[] for _ in rows], [[] for _ in rows]  # type: ignore[var-annotated]
    for step in range(100):
        active = [n for n in range(len(rows)) if step >= n and len(written[n]) < count]
        if not active:
            break
        this = make_pass([(rows[n], feeds[n][:chunk]) for n in active])
        for n in active:
            feeds[n] = feeds[n][chunk:]
        for span, logits_V in zip(this.spans, model.forward(this), strict=True):
            (n,) = [n for n in active if rows[n] is span.row]
            if not feeds[n]:
                written[n].append(int(logits_V.argmax()))
                logits[n].append(logits_V)
                feeds[n] = [written[n][-1]]
    return [(ids, torch.stack(found)) for ids, found in zip(written, logits, strict=True)]


@dataclass
class Heard:
    """What a job was told."""

    events: list[Event] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)  # of the scheduler when each came

    @property
    def failure(self) -> Failure | None:
        return next((event for event in self.events if isinstance(event, Failure)), None)

    def text(self, choice: int = 0) -> str:
        return "".join(e.text for e in self.events if isinstance(e, Piece) and e.choice == choice)

    def tokens(self, choice: int = 0) -> list[TokenInfo]:
        pieces = [e for e in self.events if isinstance(e, Piece) and e.choice == choice]
        return [token for piece in pieces for token in piece.tokens]

    def finish(self, choice: int = 0) -> str | None:
        return next(
            (
                e.finish
                for e in self.events
                if isinstance(e, Piece) and e.choice == choice and e.finish
            ),
            None,
        )


def job_for(
    scheduler: Scheduler,
    client: PackedClient,
    prompt: list[int],
    choices: int = 1,
    seconds: float = 60,
    **settings: Any,
) -> tuple[Job, Heard]:
    """A job, not yet submitted, that keeps what it hears. Log probabilities are told, so that
    tokens can be compared.
    """
    heard = Heard()

    def deliver(event: Event) -> None:
        heard.events.append(event)
        heard.passes.append(scheduler.passes)

    asked = Settings(**{"max_tokens": 8, "temperature": 0.0, "logprobs": 1, **settings})
    deadline = time.monotonic() + seconds
    return Job(client, prompt, asked, range(choices), deadline, deliver), heard


def run_until_idle(scheduler: Scheduler, most: int = 1000) -> None:
    """Step until nothing is left to do."""
    for _ in range(most):
        scheduler.step()
        if scheduler.load() == (0, 0):
            return
    raise AssertionError(f"still at work after {most} passes: {scheduler.load()}")


@contextmanager
def scheduler_on(
    base: Base, ends: frozenset[int] = frozenset(), **limits: Any
) -> Iterator[Scheduler]:
    """A scheduler whose passes the test runs itself. ends: nothing ends a text unless said."""
    model = RowModel(base)
    try:
        yield Scheduler(model, Vocabulary(base.tokenizer), ends, Limits(**limits))
    finally:
        model.close()


@dataclass(frozen=True)
class Serving:
    """A server that answers."""

    port: int
    scheduler: Scheduler
    server: Server
    thread: threading.Thread

    def client(self, key: str = "none", **settings: Any) -> OpenAI:
        """The real client, which asks once."""
        return OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1",
            api_key=key,
            **{"max_retries": 0, "timeout": 30, **settings},
        )

    def idle(self, seconds: float = 5) -> bool:
        """Nothing is writing or waiting any more, before so many seconds are over."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.scheduler.load() == (0, 0):
                return True
            time.sleep(0.01)
        return False


@contextmanager
def serving(
    base: Base,
    clients: Sequence[PackedClient],
    limits: Limits | None = None,
    bounds: Bounds | None = None,
    keys: Keys | None = None,
    grace: float = 5,
) -> Iterator[Serving]:
    """uvicorn on the loopback, in a thread of its own."""
    model = RowModel(base)
    scheduler = Scheduler(
        model, Vocabulary(base.tokenizer), end_ids(base.model, base.tokenizer), limits or Limits()
    )
    models = {client.name: Served(client, 1_700_000_000) for client in clients}
    api = Api(models, scheduler, bounds or Bounds(base.model.config.max_position_embeddings), keys)
    config = uvicorn_settings(api, grace)
    ready, listener = threading.Event(), listen("127.0.0.1", 0)
    server = Server(config, scheduler, grace, ready.set)
    scheduler.start()
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        assert ready.wait(10)
        yield Serving(listener.getsockname()[1], scheduler, server, thread)
    finally:
        server.should_exit = True
        thread.join(20)
        scheduler.stop(0)
        scheduler.join()
        model.close()
        assert not thread.is_alive()


def raw_request(
    serving: Serving, body: bytes, path: str = "/v1/completions", **headers: str
) -> socket.socket:
    """A connection on which a request was sent, and whose answer nobody has read."""
    lines = {
        "Host": "127.0.0.1",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        **headers,
    }
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(20)
    connection.connect(("127.0.0.1", serving.port))
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    connection.sendall(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body)
    return connection


def word_base(window: int = 64) -> Base:
    """A tiny base each of whose tokens is a word, so that every token is heard of at once. window:
    tokens it reads.
    """
    base = tiny("tiny-llama")
    base.model.config.max_position_embeddings = window
    base.model.generation_config.eos_token_id = None  # the model cannot write its end
    words = {f" w{id}": id for id in range(257)} | {"<|endoftext|>": 257}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token=" w0")),
        eos_token="<|endoftext|>",
    )
    return replace(base, tokenizer=tokenizer)


def ask(client, model="run/ann", **settings):
    """One chat completion."""
    return client.chat.completions.create(
        model=model, messages=HELLO, **{"max_tokens": 8, "temperature": 0, **settings}
    )


def answer_to(connection):
    """The status and the JSON of a whole answer."""
    raw = b""
    with connection:
        while b"\r\n\r\n" not in raw:
            raw += connection.recv(65536)
        head, _, body = raw.partition(b"\r\n\r\n")
        headers = dict(line.lower().split(b": ") for line in head.split(b"\r\n")[1:])
        length = int(headers[b"content-length"])
        while len(body) < length:
            body += connection.recv(65536)
    return int(head.split()[1]), json.loads(body)
