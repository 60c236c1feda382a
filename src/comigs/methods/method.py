"""The Method record, and how a method is found.

A method is a record of functions over slots and tensors; it never sees a client, a model or data.
Its contract, which `tests/test_method_contract.py` holds every file of this folder to:

- an upload holds the slots that it `shares` and trained this round, a download touches the slots it
  `receives`,
  nothing else. No method can share a specialist or a router: a client refuses to send them,
  whatever the method says;
- `aggregate` is pure and gives one download to every client it can; a client it leaves out gets
  what it was last
  given; identical uploads come back unchanged; permuting clients permutes downloads; every client's
  upload counts; one client alone trains as if there were no server;
- any of the clients may be missing from a round's uploads;
- clients that get the same get one object, so that an idle client costs the server a number;
  uploads may be read from
  the disk at each look, so `aggregate` looks at one after the other where it can (`RoundContext.mean`
  does);
- tensors keep dtype and device; `memory` (the server's carry-over) survives being saved and loaded;
- unequal ranks work, or `method(config)` refuses them before anything runs.

A new method is a new file here with `def method(config: Config) -> Method`, and, where it has
settings of its own, `class Options(Section)`, read from the config's [options];
`methods/ffa_lora.py` is `ffa-lora`.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Literal, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor

from comigs import methods
from comigs.config import Config, ExpertShape, Section, UploadSection
from comigs.config.errors import one_line
from comigs.errors import UserError, nearest
from comigs.methods import lowrank
from comigs.slots import OTHERS, Slot

Tensors = Mapping[Slot, Tensor]
Upload = Tensors
Download = Tensors
Memory = Mapping[str, Tensor]
Mixed = tuple[
    Tensors, float
]  # what is written of a download, and how far towards it that is: from 0 to 1
Settings = TypeVar("Settings", bound=Section)
Key = TypeVar("Key")


@dataclass(frozen=True)
class RoundContext:
    """What the server knows of a round beside the uploads.

    clients: all clients of the run, in the config's order, whether they sent something or not.
    weights: of those that sent something, where a method weighs them by their text: tokens in
        train, or as the config says.
    peer_nats: reader -> author -> nats per token of the author's model on the reader's valid; empty
        without `reads_peers`.
    upload: how uploads become one.
    """

    clients: tuple[str, ...]
    weights: Mapping[str, float] = field(default_factory=dict)
    peer_nats: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    upload: UploadSection = field(default_factory=UploadSection)

    def mean(self, uploads: Iterable[Mapping[Key, Tensor]]) -> dict[Key, Tensor]:
        """The mean of uploads, or what stands for it: `upload.merge`."""
        return mean(uploads, self.upload.merge, self.upload.trim)


Schedule = Literal["alternating", "joint", "both"]
Aggregate = Callable[
    [Mapping[str, Upload], Memory, RoundContext], tuple[dict[str, Download], Memory]
]


@dataclass(frozen=True)
class Method:
    """One whole recipe.

    name, summary, paper: for people; summary is one line, paper an arXiv number.
    weights: how much each client counts in the server's merge, in a few words for people.
    shares(slot): the slot is in a client's upload in rounds that train it. receives(slot): it is in
    a download.
    shape(shape): which of a client's experts are generalists and which specialists, the budget kept
    as configured;
        and whether the rest of the world is beside them, which a method receives as that, and never
        trains.
    trains(slot, round): the slot, unless it is frozen, is trained in that round (from 1).
    aggregate(uploads by client, memory, context) -> (downloads by client, memory).
    mixing: "routed" by the router; "uniform": the mean of all experts; "sum": one expert, whose
    LoRA is their sum.
    schedule: "alternating" trains the router by itself, every `router_every` local steps
        (bi-level); "joint" trains it with the experts on train; "both" does both.
    penalty(tensors, anchor): added to the loss of local steps; anchor: the tensors as the round
    began.
    after_training(tensors, anchor): what a client's tensors become between its training and its upload;
    entries that it sets
        to zero stay zero until a download writes them, for their optimiser moments are cleared.
    merges: a client adds every "update" it receives to a frozen (out, in) change of that linear
    ("merged").
    reinitializes: whoever merged an update draws its shared A anew as at the start and sets B to zero.
    probe: windows of its valid, drawn anew each round, on which a client compares models.
    reads_peers: each client measures every other client's upload (RoundContext.peer_nats).
    adopt(own, download, nats): what a client writes of a download that it may weigh against its own
    tensors first, and
        how far towards it that is; nats(tensors): per token, on `probe` windows of its valid.
    finish(tensors, nats): what a client's tensors become at the very end; nats(tensors): per token,
    on its valid.
    centralized: one model is trained on the text of all clients with as many times the batch, and
    everybody gets it.
    averages: whatever `aggregate` makes of uploads goes through RoundContext.mean, which `upload.merge`
    can replace.
    """

    name: str
    summary: str
    paper: str
    shares: Callable[[Slot], bool]
    receives: Callable[[Slot], bool]
    aggregate: Aggregate
    weights: str = "equal"
    shape: Callable[[ExpertShape], ExpertShape] = lambda shape: shape
    trains: Callable[[Slot, int], bool] = lambda slot, round: True
    mixing: Literal["routed", "uniform", "sum"] = "routed"
    schedule: Schedule = "alternating"
    penalty: Callable[[Tensors, Tensors], Tensor] | None = None
    after_training: Callable[[Tensors, Tensors], Tensors] | None = None
    merges: bool = False
    reinitializes: bool = False
    probe: int = 0
    reads_peers: bool = False
    mix: Callable[[Tensors, Download, Callable[[Tensors], float]], Mixed] | None = None
    finish: Callable[[Tensors, Callable[[Tensors], float]], Tensors] | None = None
    centralized: bool = False
    averages: bool = False

    def sends(self, slot: Slot, round: int) -> bool:
        """The slot is in a client's upload in that round: it is shared, and was trained. What is
        merged is neither.
        """
        return self.shares(slot) and not slot.is_frozen and self.trains(slot, round)


def load_method(config: Config) -> Method:
    """The method that the config names: a file of this folder or `package.module`. Raises
    UserError.
    """
    name = config.method
    module = method_module(name)
    build: Callable[[Config], Method] | None = getattr(module, "method", None)
    if build is None:
        raise UserError(f'method: "{name}" cannot be used: expected a module with method(config)')
    given, known = config.options, getattr(module, "Options", Section)
    if unknown := [key for key in given if key not in known.model_fields]:
        takes = ", ".join(known.model_fields) or "none"
        near = nearest(unknown[0], list(known.model_fields))
        raise UserError(
            f'options.{unknown[0]}: "{name}" has no such option.{near} Its options: {takes}'
        )
    options(config, known)
    built = build(config)
    _require_possible(config, built)
    return built


def _require_possible(config: Config, method: Method) -> None:
    """Refuse settings of other sections that this method cannot follow. Raises UserError naming the
    field.
    """
    merge, p = config.upload.merge, config.participation
    if merge != "mean" and not method.averages:
        raise UserError(
            f'upload.merge: given "{merge}", but {config.method} merges in its own way; must be "mean" (fedavg, comigs '
            f'and others that average uploads can do "{merge}")'
        )
    for client in config.clients:
        experts, top_k = method.shape(config.shape_of(client)).num_experts, config.experts.top_k
        if top_k > experts > 1:
            raise UserError(
                f'experts.top_k: {top_k} experts per token, but client "{client.name}" has {experts} with '
                f"{config.method}; allowed: 1 to {experts}"
            )
    everybody = {
        "clients_per_round": (p.clients_per_round, len(config.clients)),
        "min_clients": (p.min_clients, 1),
    }
    for field_, (given, allowed) in everybody.items():
        if method.centralized and given not in (None, allowed):
            raise UserError(
                f"participation.{field_}: given {given}, but {config.method} trains one model in one place on "
                "everybody's text; leave it out"
            )


def method_module(name: str) -> ModuleType:
    """The module that defines the method of that name. Raises UserError with the nearest name."""
    path = name if "." in name else f"comigs.methods.{name.replace('-', '_')}"
    if not re.fullmatch(r"\w+(\.\w+)+", name) and name not in list_methods():
        raise UserError(
            f'method: unknown method "{name}".{nearest(name, list_methods())} Known: {", ".join(list_methods())}'
        )
    try:
        return importlib.import_module(path)
    except ImportError as error:
        raise UserError(
            f'method: "{name}" cannot be used: {error}; expected a module with method(config)'
        ) from None


def options(config: Config, kind: type[Settings]) -> Settings:
    """The config's [options] as the method's own section, or those of them that it has.

    Raises UserError naming the field.
    """
    try:
        return kind.model_validate(
            {key: value for key, value in config.options.items() if key in kind.model_fields}
        )
    except ValidationError as error:
        raise UserError(f"options.{one_line(error, dict(config.options), {'': kind})}") from None


NO_METHODS = ("method", "lowrank")  # files of this folder that the methods are made of


def list_methods() -> list[str]:
    """Names of the methods in this folder, as users type them."""
    return [
        i.name.replace("_", "-")
        for i in pkgutil.iter_modules(methods.__path__)
        if i.name not in NO_METHODS
    ]


def mean_of_uploads(
    uploads: Mapping[str, Upload], memory: Memory, context: RoundContext
) -> tuple[dict[str, Download], Memory]:
    """Unweighted mean over clients, slot by slot (1602.05629 with equal weights); the same download
    for all.
    """
    return dict.fromkeys(context.clients, context.mean(uploads.values())), memory


def mean(
    uploads: Iterable[Mapping[Key, Tensor]],
    how: Literal["mean", "trimmed", "median"] = "mean",
    trim: float = 0.25,
) -> dict[Key, Tensor]:
    """Mean of uploads slot by slot, or what stands for it. Empty without uploads.

    how: "trimmed" leaves out the `trim` largest and smallest of n values of each number (floor(trim
    * n) at either end); "median" all but the middle one, or two. Summed in float64, one upload in
    memory at a time, so that the mean is independent of the clients' order and exact for equal
    uploads.
    """
    if how == "mean":
        return _running_mean(uploads)
    given = list(uploads)
    cut = (len(given) - 1) // 2 if how == "median" else int(trim * len(given))
    return {
        slot: _middle(torch.stack([upload[slot].to(torch.float64) for upload in given]), cut).to(
            tensor.dtype
        )
        for slot, tensor in (given[0] if given else {}).items()
    }


def _running_mean(uploads: Iterable[Mapping[Key, Tensor]]) -> dict[Key, Tensor]:
    totals: dict[Key, Tensor] = {}
    dtypes: dict[Key, torch.dtype] = {}
    count = 0
    for count, upload in enumerate(uploads, start=1):
        if count == 1:
            dtypes = {slot: tensor.dtype for slot, tensor in upload.items()}
            totals = {slot: tensor.to(torch.float64, copy=True) for slot, tensor in upload.items()}
            continue
        assert upload.keys() == totals.keys(), "clients share different slots"
        for slot, tensor in upload.items():
            totals[slot] += tensor
    return {slot: (total / count).to(dtypes[slot]) for slot, total in totals.items()}


def _middle(values_N: Tensor, cut: int) -> Tensor:
    """Mean over the first dimension without the `cut` smallest and largest."""
    return values_N.sort(dim=0).values[cut : len(values_N) - cut].mean(dim=0)


def pairs(tensors: Tensors) -> dict[tuple[int, str, str], lowrank.Pair]:
    """(layer, site, part) -> (A, B) of every LoRA in `tensors`, in float64."""
    return {
        (slot.layer, slot.site, slot.part): (
            A.to(torch.float64),
            tensors[Slot(slot.layer, slot.site, slot.part, "B")].to(torch.float64),
        )
        for slot, A in tensors.items()
        if slot.matrix == "A"
    }


def slots(at: tuple[int, str, str], pair: lowrank.Pair, like: Tensor) -> dict[Slot, Tensor]:
    """The inverse of `pairs` for one of them, with the dtype and device of `like`."""
    return {Slot(*at, "A"): pair[0].to(like), Slot(*at, "B"): pair[1].to(like)}


def one_expert(role: Literal["generalist", "specialist"]) -> Callable[[ExpertShape], ExpertShape]:
    """A `Method.shape`: a single expert of the ranks of all experts together (two of rank 8: one of
    rank 16).
    """

    def shape(shape: ExpertShape) -> ExpertShape:
        total = shape.generalists * shape.rank + shape.specialists * shape.specialist_rank
        counts = {
            "generalists": int(role == "generalist"),
            "specialists": int(role == "specialist"),
        }
        return shape.model_copy(update={**counts, "rank": total, "specialist_rank": total})

    return shape


def beside_others(router: Literal["open", "gated"]) -> Callable[[ExpertShape], ExpertShape]:
    """A `Method.shape`: a single generalist of all ranks, and the rest of the world."""
    return lambda shape: one_expert("generalist")(shape).model_copy(update={"others": router})


def others_of(tensors: Tensors) -> dict[Slot, Tensor]:
    """The only generalist as the rest of the world."""
    return {
        replace(slot, part=OTHERS): tensor
        for slot, tensor in tensors.items()
        if slot.role == "generalist"
    }


def shares_all(slot: Slot) -> bool:
    """A `Method.shares` and `receives`: every expert and the attention LoRA (no router, no
    specialist).
    """
    return slot.role in ("generalist", "attention")


def require_equal(
    config: Config, field: Literal["rank", "num_experts"], why: str,
    shape: Callable[[ExpertShape], ExpertShape] = lambda shape: shape,
) -> None:  # fmt: skip
    """Refuse clients whose experts differ in `field` after `shape`. Raises UserError naming two of
    them.
    """
    values = {c.name: getattr(shape(config.shape_of(c)), field) for c in config.clients}
    first = next(iter(values))
    for name, value in values.items():
        if value != values[first]:
            raise UserError(
                f"clients.{name}: {field} {value}, but {first} has {values[first]}; {why}"
            )
