"""The Method record, and how a method is found.

A method is a record of functions over slots and tensors; it never sees a client, a model or data. Its contract, which
`tests/test_method_contract.py` holds every file of this folder to:

- an upload holds the slots it `shares` and a download touches the slots it `receives`, nothing else. No method can
  share a specialist or a router: a client refuses to send them, whatever the method says;
- `aggregate` is pure and gives one download per client; identical uploads come back unchanged; permuting clients
  permutes downloads; every client's upload counts; one client alone trains as if there were no server;
- tensors keep dtype and device; `memory` (the server's carry-over) survives being saved and loaded;
- unequal ranks work, or `check` refuses them before anything runs.

A new method is a new file here with `def method(config: Config) -> Method`; `methods/ffa_lora.py` is `ffa-lora`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from comigs import methods
from comigs.config import Config, ExpertShape
from comigs.errors import UserError, nearest
from comigs.slots import Slot

Upload = Mapping[Slot, Tensor]
Download = Mapping[Slot, Tensor]
Memory = Mapping[str, Tensor]
Aggregate = Callable[[Mapping[str, Upload], Memory], tuple[dict[str, Download], Memory]]


@dataclass(frozen=True)
class Method:
    """One whole recipe.

    name, summary, paper: for people; summary is one line, paper an arXiv number.
    shares(slot): the slot is in a client's upload. receives(slot): it is in a client's download.
    shape(shape): which of a client's experts are generalists and which specialists, the budget kept as configured.
    trains(slot, round): the slot is trained in that round (from 1).
    aggregate(uploads by client, memory) -> (downloads by client, memory).
    routed: tokens are routed; False mixes all experts uniformly.
    schedule: "alternating" trains the router by itself on valid, every `router_every` local steps (bi-level);
        "joint" trains it with the experts on train.
    """

    name: str
    summary: str
    paper: str
    shares: Callable[[Slot], bool]
    receives: Callable[[Slot], bool]
    aggregate: Aggregate
    shape: Callable[[ExpertShape], ExpertShape] = lambda shape: shape
    trains: Callable[[Slot, int], bool] = lambda slot, round: True
    routed: bool = True
    schedule: Literal["alternating", "joint"] = "alternating"


def load_method(config: Config) -> Method:
    """The method that the config names: a file of this folder or `package.module`. Raises UserError."""
    name = config.method
    path = name if "." in name else f"comigs.methods.{name.replace('-', '_')}"
    if "." not in name and name not in list_methods():
        raise UserError(
            f'method: unknown method "{name}".{nearest(name, list_methods())} Known: {", ".join(list_methods())}'
        )
    try:
        build: Callable[[Config], Method] = importlib.import_module(path).method
    except (ImportError, AttributeError) as error:
        raise UserError(f'method: "{name}" cannot be used: {error}; expected a module with method(config)') from None
    return build(config)


def list_methods() -> list[str]:
    """Names of the methods in this folder, as users type them."""
    return [i.name.replace("_", "-") for i in pkgutil.iter_modules(methods.__path__) if i.name != "method"]


def mean_of_uploads(uploads: Mapping[str, Upload], memory: Memory) -> tuple[dict[str, Download], Memory]:
    """Unweighted mean over clients, slot by slot (1602.05629 with equal weights); the same download for all.

    Summed in float64, so that the result is independent of the clients' order and exact for equal uploads.
    """
    first = next(iter(uploads.values()))
    assert all(upload.keys() == first.keys() for upload in uploads.values()), "clients share different slots"
    mean = {
        slot: torch.stack([u[slot].to(torch.float64) for u in uploads.values()]).mean(dim=0).to(tensor.dtype)
        for slot, tensor in first.items()
    }
    return dict.fromkeys(uploads, mean), memory


def require_equal(config: Config, field: Literal["rank", "num_experts"], why: str) -> None:
    """Refuse clients whose experts differ in `field`. Raises UserError naming two of them."""
    values = {c.name: getattr(config.shape_of(c), field) for c in config.clients}
    first = next(iter(values))
    for name, value in values.items():
        if value != values[first]:
            raise UserError(f"clients.{name}: {field} {value}, but {first} has {values[first]}; {why}")
