"""`comigs serve` under load: many streams at once against one after the other, on one base.

    python benchmarks/serve.py [--base smollm2-135m] [--clients 4] [--streams 8] [--repeats 3]

Requests go through the real server over the loopback, with the `openai` package (the extra `dev`)
in a process of its own. Every turn asks one after the other and then at once, so that noise of the
machine meets both; the ratio is the median over the turns, by the clock and by the server's CPU
seconds, of which a busy machine changes less. Answers must be the same texts.

Then, with all streams running, further requests with longer and longer prompts: how many forward
passes until each has its first token, the pass that is under way when it comes not left out. Last,
how much memory the process takes for each further client, over the bytes of the client's tensors.
The experts are random, of the default shape.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import multiprocessing
import queue
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from openai import OpenAI

from comigs.bases.load import Base, load_base
from comigs.config import BaseSection, Config, parse_config
from comigs.experts.attach import Attachment
from comigs.experts.init import starting_tensors
from comigs.methods.loading import load_method
from comigs.personal.serve.answers import Bounds
from comigs.personal.serve.app import Api, Served
from comigs.personal.serve.jobs import Event, Job, Piece, Settings
from comigs.personal.serve.model import RowModel
from comigs.personal.serve.packed import PackedClient, pack
from comigs.personal.serve.scheduler import Limits, Scheduler
from comigs.personal.serve.server import Server, listen, uvicorn_settings
from comigs.personal.serve.text import Vocabulary

FURTHER = 8  # clients whose memory is measured
GOALS = {"speedup": 3.0, "passes": 3, "memory": 1.2}


def random_client(base: Base, config: Config, number: int) -> tuple[PackedClient, int]:
    """Return a client with the default experts, away from the base, and the bytes of its
    tensors.
    """
    shape = load_method(config).shape(config.shape_of(config.clients[0]))
    with Attachment(base.model, base.architecture, config.experts) as attachment:
        shapes = attachment.slot_shapes(shape, routed=True)
        tensors = starting_tensors(shapes, seed=number, client=str(number))
        random = torch.Generator().manual_seed(number)
        for slot, tensor in tensors.items():
            if slot.matrix == "B" and slot.role != "router":
                tensor.normal_(0, 0.02, generator=random)
            elif slot.matrix == "B":
                tensor.fill_(0.5)
        attachment.bind(tensors)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        return pack(attachment, f"run/{number}", number, base.dtype), size


@dataclass(frozen=True)
class Running:
    """A server that answers at `address`."""

    address: str
    scheduler: Scheduler


@contextmanager
def serving(base: Base, clients: list[PackedClient], rows: int) -> Iterator[Running]:
    """Run the real server in a thread. Nothing ends a text, so that every answer is as long."""
    model = RowModel(base)
    scheduler = Scheduler(model, Vocabulary(base.tokenizer), frozenset(), Limits(rows=rows))
    models = {client.name: Served(client, 0) for client in clients}
    # As `comigs serve` does it, but in a thread, whose end is not a signal.
    listener, ready = listen("127.0.0.1", 0), threading.Event()
    api = Api(models, scheduler, Bounds(context_of(base)))
    server = Server(uvicorn_settings(api, 5), scheduler, 5, ready.set)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    scheduler.start()
    thread.start()
    try:
        ready.wait()
        yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", scheduler)
    finally:
        server.should_exit = True
        thread.join()
        scheduler.stop(0)
        scheduler.join()
        model.close()


def prompt(number: int, length: int) -> list[int]:
    """Return any tokens."""
    random = torch.Generator().manual_seed(number)
    return torch.randint(1000, 8000, (length,), generator=random).tolist()


@dataclass(frozen=True)
class Asked:
    """What a client asks for: an answer of `tokens` tokens after a prompt of `prompt`."""

    address: str
    prompt: int
    tokens: int


def stream(asked: Asked, model: str, number: int) -> str:
    """Ask for one answer as a stream; return its text."""
    with OpenAI(base_url=asked.address, api_key="none", max_retries=0, timeout=3600) as client:
        answer = client.completions.create(
            model=model,
            prompt=prompt(number, asked.prompt),
            max_tokens=asked.tokens,
            temperature=0,
            stream=True,
        )
        return "".join(chunk.choices[0].text for chunk in answer)


def one_after_the_other(asked: Asked, work: list[tuple[str, int]]) -> list[str]:
    """Return the texts of all answers, each asked for when the one before has ended."""
    return [stream(asked, model, number) for model, number in work]


def at_once(asked: Asked, work: list[tuple[str, int]]) -> list[str]:
    """Return the texts of all answers, asked for at the same time."""
    with ThreadPoolExecutor(len(work)) as threads:
        return list(threads.map(lambda each: stream(asked, *each), work))


def speeds(running: Running, names: list[str], settings: argparse.Namespace) -> dict[str, Any]:
    """Return tokens a second in both ways, and whether the texts are the same.

    Who asks is a process of its own, so that the CPU seconds of this one are the server's.
    """
    asked = Asked(running.address, settings.prompt, settings.tokens)
    work = [(names[n % len(names)], n) for n in range(settings.streams)]
    tokens = settings.tokens * settings.streams
    turns = []
    same = True
    # A fork would take this process's threads and memory along.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as clients:
        clients.submit(one_after_the_other, asked, work[:1]).result()  # imports, first pages
        for _ in range(settings.repeats):
            alone, slow = timed(clients.submit, one_after_the_other, asked, work)
            together, fast = timed(clients.submit, at_once, asked, work)
            turns.append([(tokens / a, tokens / b, a / b) for a, b in zip(slow, fast, strict=True)])
            same = same and alone == together
    found: dict[str, Any] = {"same_texts": same}
    for kind, name in enumerate(("wall", "cpu")):
        of_kind = [turn[kind] for turn in turns]
        for place, what in enumerate(("one_after_the_other", "at_once", "speedup")):
            found[f"{what}_{name}"] = statistics.median(figures[place] for figures in of_kind)
    return found


def timed(submit: Callable[..., Any], *work: Any) -> tuple[list[str], tuple[float, float]]:
    """Return the result of some work, and the seconds by the clock and of this process's CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    done: list[str] = submit(*work).result()
    return done, (time.perf_counter() - wall, time.process_time() - cpu)


def first_tokens(running: Running, clients: list[PackedClient], streams: int) -> dict[int, int]:
    """Return how many passes a request waits for its first token beside running streams.

    The keys are lengths of prompts in tokens.
    """
    scheduler = running.scheduler
    window = context_of(scheduler.model.base)
    ignored: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
    load = []
    for number in range(streams):
        client = clients[number % len(clients)]
        load.append(job(scheduler, client, prompt(number, 32), window - 32, ignored))
    scheduler.submit(load)
    # Each request comes when all streams are writing; the pass that runs then began without it.
    passes = {}
    for length in (length for length in (8, 32, 128, 512) if length < window):
        while scheduler.load()[0] < streams:
            time.sleep(0.01)
        heard: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
        asked = job(scheduler, clients[0], prompt(length, length), 1, heard)
        before = scheduler.passes
        scheduler.submit([asked])
        after, event = heard.get()
        assert isinstance(event, Piece), event
        passes[length] = after - before
    for each in load:
        each.cancelled = True
    return passes


def job(
    scheduler: Scheduler,
    client: PackedClient,
    ids: list[int],
    tokens: int,
    heard: queue.SimpleQueue[tuple[int, Event]],
) -> Job:
    """Return a job whose events go to `heard`, each with the pass after which it came."""
    settings = Settings(tokens, temperature=0)
    deadline = time.monotonic() + 3600
    return Job(
        client,
        ids,
        settings,
        range(1),
        deadline,
        lambda event: heard.put((scheduler.passes, event)),
    )


def context_of(base: Base) -> int:
    """Return how many tokens a prompt and its answer have together."""
    return min(2048, int(base.model.config.max_position_embeddings))


def memory(base: Base, config: Config) -> float:
    """Return the bytes that the process takes for a further client over those of its tensors."""
    process = psutil.Process()
    kept = [
        random_client(base, config, 100)[0]
    ]  # what the first one brings along is not the others'
    gc.collect()
    before = process.memory_info().rss
    sizes = 0
    for number in range(FURTHER):
        client, size = random_client(base, config, 101 + number)
        kept.append(client)
        sizes += size
    gc.collect()
    return (process.memory_info().rss - before) / sizes


def main() -> None:
    """Print what was measured, and write it where it was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    settings = parser.parse_args()
    # Memory comes first, while nothing else has grown the process.
    torch.set_num_threads(settings.threads)
    section = BaseSection(name=settings.base, dtype=settings.dtype, device=settings.device)
    base = load_base(section)
    config = parse_config(
        {"base": {"name": settings.base}, "clients": [{"name": "x", "text": "x"}]}
    )
    per_client = memory(base, config)
    clients = [random_client(base, config, number)[0] for number in range(settings.clients)]
    with serving(base, clients, rows=settings.streams + 1) as running:
        found = speeds(running, [client.name for client in clients], settings)
        passes = first_tokens(running, clients, settings.streams)
    found |= {"passes_to_first_token": passes, "memory_over_tensors": per_client}
    found["bytes_of_a_client"] = clients[0].num_bytes()
    who = f"{settings.streams} streams of {settings.clients} clients"
    print(f"{who} on {base.name}, {settings.dtype}, {settings.device}")
    for kind in ("wall", "cpu"):
        print(f"  one after the other {found[f'one_after_the_other_{kind}']:.1f} tokens per {kind} "
              f"second, at once {found[f'at_once_{kind}']:.1f}: "
              f"{found[f'speedup_{kind}']:.2f} times (goal {GOALS['speedup']})")  # fmt: skip
    print(f"  the same texts: {found['same_texts']}")
    for length, count in passes.items():
        print(f"  first token after a prompt of {length}: {count} passes (goal {GOALS['passes']})")
    print(f"  a client: {found['bytes_of_a_client'] / 1e6:.1f} MB, "
          f"memory {per_client:.2f} times its tensors (goal {GOALS['memory']})")  # fmt: skip
    if settings.out is not None:
        settings.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
