"""What the tests of the core share: tiny bases, experts that differ, and small runs over made-up
text.
"""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from comigs import csrc
from comigs.bases.base import Architecture
from comigs.bases.load import Base, load_base
from comigs.client.client import Client
from comigs.config import BaseSection, Config, ExpertShape, ExpertsSection, parse_config
from comigs.data.prepare import prepare
from comigs.engines.in_process import InProcess
from comigs.experts.attach import Attachment, Layout
from comigs.methods.loading import load_method
from comigs.runs.folder import RunFolder
from comigs.slots import Slot

torch.set_num_threads(1)  # the numbers some tests hold were made with one thread
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a shell's background job is begun with Ctrl-C ignored


@pytest.hookimpl(tryfirst=True)  # before those that are not asked for are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test with `few(n)` is slow for all of its parameters but the first n: `make test` has some
    of each kind, `make test-all` has all.
    """
    seen: Counter[str] = Counter()
    for item in items:
        few = item.get_closest_marker("few")
        if few is not None:
            name = item.nodeid.partition("[")[0]
            seen[name] += 1
            if seen[name] > few.args[0]:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(params=["C", "PyTorch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to compute experts, frozen blocks and losses, whatever there is on this machine."""
    if request.param == "PyTorch":
        monkeypatch.setattr(csrc, "library", lambda: None)
    elif csrc.library() is None:
        pytest.skip("no C compiler")


WORDS = {  # what each client writes about; no word is anybody else's
    "ada": "engine number analysis table note wheel loom pattern",
    "bob": "paint happy little cloud tree mountain river brush",
    "cyd": "dance studio rhythm silk stage turning shadow light",
    "dan": "kernel module driver thread socket buffer cache lock",
}


def tiny(name: str, dtype: str = "float32") -> Base:
    """A base of bases/tiny.py on the CPU, made anew, so that a test may do with it what it
    likes.
    """
    return load_base(BaseSection(name=name, dtype=dtype, device="cpu"))


# [options] of comigs that make the paper's mixture of it: a specialist is an expert of its own
APART = {"specialists": "apart", "attention": "mean"}


def shape_of(
    generalists: int, specialists: int, rank: int = 3, specialist_rank: int | None = None
) -> ExpertShape:
    return ExpertShape(
        generalists=generalists,
        specialists=specialists,
        rank=rank,
        specialist_rank=specialist_rank or rank,
        attention_rank=2,
    )


def random_tensors(
    attachment: Attachment,
    shape: ExpertShape,
    routed: bool,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[Slot, Tensor]:
    """Experts far from the base and from each other: nothing is zero."""
    random = torch.Generator().manual_seed(seed)
    size = {"A": 0.25, "B": 0.05, "W": 1.0}
    return {
        slot: (torch.randn(dims, generator=random, dtype=torch.float64) * size[slot.matrix]).to(
            dtype
        )
        for slot, dims in attachment.slot_shapes(shape, routed).items()
    }


def attach(
    model: Any,
    architecture: Architecture,
    top_k: int = 2,
    layout: Layout | None = None,
    **settings: Any,
) -> Attachment:
    section = ExpertsSection(**{"top_k": top_k, "strength": "each", **settings})
    return Attachment(model, architecture, section, layout or Layout())


def run_config(
    root: Path,
    names: str = "ada bob",
    entries: Mapping[str, Mapping[str, Any]] | None = None,
    **tree: Any,
) -> Config:
    """A small run of these clients on tiny-gpt2. entries: more of a [[clients]] table; tree:
    sections.
    """
    for name in names.split():
        folder, words = root / name, WORDS[name].split()
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(9):
            text = " ".join(words[(number * k * k + k) % len(words)] for k in range(24))
            (folder / f"{number}.txt").write_text(
                f"{text}, says {name} on page {number}.", encoding="utf-8"
            )
    sections: dict[str, dict[str, Any]] = {
        "base": {"name": "tiny-gpt2", "dtype": "float32", "device": "cpu", "threads": 1},
        "data": {"root": str(root), "cache": str(root / "cache"), "sequence_length": 12},
        "experts": {"rank": 2, "specialist_rank": 2, "attention_rank": 2},
        "client": {"steps": 2, "batch_size": 4, "router_every": 2, "router_steps": 2, "lr": 5e-3},
        "evaluation": {"batch_size": 8},
        "participation": {},
        "upload": {},
        "conditions": {},
        "privacy": {},
        "options": {},
    }
    plain = {key: value for key, value in tree.items() if not isinstance(value, dict)}
    merged = {key: {**sections.get(key, {}), **tree.get(key, {})} for key in sections}
    clients = [
        {"name": name, "text": name, **(entries or {}).get(name, {})} for name in names.split()
    ]
    return parse_config({"rounds": 2, **merged, **plain, "clients": clients})


@dataclass(frozen=True)
class Started:
    """An engine ready for the first exchange, and all its clients in memory, to look at and to
    change.
    """

    engine: InProcess
    clients: dict[str, Client]
    attachment: Attachment
    trainers: set[str]


def start_engine(config: Config) -> Started:
    """Everything that a run of this config has, in a new run folder beside the text."""
    path = next(p for n in count() if not (p := config.data.root / f"started-{n}").exists())
    base, folder = load_base(config.base), RunFolder.create(path, config, {})
    data = prepare(config, base.encoder)
    engine = InProcess(config, load_method(config), base, data, folder, lambda event: None)
    clients = {client.name: engine.host.client(client.name) for client in config.clients}
    return Started(engine, clients, engine.host.attachment, engine.host.trainers)


def copy_of(tensors: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
    return {key: tensor.detach().clone() for key, tensor in tensors.items()}


def same(a: Mapping[Any, Tensor], b: Mapping[Any, Tensor]) -> bool:
    """Equal keys, and tensors equal to the bit (NaN too)."""
    return a.keys() == b.keys() and all(bits(a[key]) == bits(b[key]) for key in a)


def bits(tensor: Tensor) -> tuple[Any, ...]:
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return tensor.dtype, tuple(tensor.shape), raw


@pytest.fixture(params=["tiny-gpt2", "tiny-llama"])
def base(request: pytest.FixtureRequest) -> Base:
    return tiny(request.param)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread in every test, whatever a run in the test before set."""
    torch.set_num_threads(1)
    yield


def until(true, seconds=60):
    """Wait until it is true, and not for ever."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)
