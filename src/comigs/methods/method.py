"""This module holds the record of a method: who shares what, how the server merges, what learns.

A method is a record of functions over slots and tensors; it never sees a client, a model or data.
`tests/test_method_contract.py` holds every method of this folder to this contract:

- An upload holds the slots that the method `shares` and trained this round, a download touches the
  slots that it `receives`, nothing else. No method can share a specialist or a router: a client
  refuses to send them, whatever the method says.
- `aggregate` is pure and gives one download to every client it can; a client that it leaves out
  gets what it was last given. Identical uploads come back unchanged; permuting clients permutes
  downloads; every client's upload counts; one client alone trains as if there were no server.
- Any of the clients may be missing from a round's uploads.
- Clients that get the same get one object, so that an idle client costs the server a number.
  Uploads may be read from the disk at each look, so `aggregate` looks at one after the other where
  it can (`RoundContext.mean` does).
- Tensors keep dtype and device; `memory` (the server's carry-over) survives being saved and loaded.
- Unequal ranks work, or `method(config)` refuses them before anything runs.

A new method is a new file here with `def method(config: Config) -> Method`, and, where it has
settings of its own, `class Options(Section)`, read from the config's [options];
`methods/ffa_lora.py` is `ffa-lora`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from comigs.config import Config, ExpertShape, UploadSection
from comigs.methods.merging import Key, mean
from comigs.slots import Slot

Tensors = Mapping[Slot, Tensor]
Upload = Tensors
Download = Tensors
Memory = Mapping[str, Tensor]
Nats = Callable[[Tensors], float]  # nats per token of a client's model with these tensors
Mixed = tuple[Tensors, float]  # what is written of a download, and how far towards it that is: 0-1
# A client's model as it ends; and the one part of it that this is (runs/record.py), or None.
Finished = tuple[Tensors, str | None]
Schedule = Literal["alternating", "joint", "both"]


@dataclass(frozen=True)
class RoundContext:
    """The context is what the server knows of a round beside the uploads.

    clients: all clients of the run, in the config's order, whether they sent something or not.
    weights: of those that sent something, where a method weighs them by their text: tokens in
        train, or as the config says.
    peer_nats: reader -> author -> nats per token of the author's model on the reader's valid; empty
        without `reads_peers`.
    upload: how uploads become one. private_mean: what takes the place of that, where the server
        adds noise.
    """

    clients: tuple[str, ...]
    weights: Mapping[str, float] = field(default_factory=dict)
    peer_nats: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    upload: UploadSection = field(default_factory=UploadSection)
    private_mean: Callable[[Iterable[Any]], dict[Any, Tensor]] | None = None

    def mean(self, uploads: Iterable[Mapping[Key, Tensor]]) -> dict[Key, Tensor]:
        """Return the mean of uploads, or what `upload.merge` puts in its place."""
        if self.private_mean is not None:
            return self.private_mean(uploads)
        return mean(uploads, self.upload.merge, self.upload.trim)


Aggregate = Callable[
    [Mapping[str, Upload], Memory, RoundContext], tuple[dict[str, Download], Memory]
]


@dataclass(frozen=True)
class Method:
    """A method is one whole recipe.

    name, summary, paper: for people; the summary is one line, the paper an arXiv number.
    shares(slot): whether a slot is in a client's upload in rounds that train it.
    receives(slot): whether a slot is in a download.
    aggregate(uploads by client, memory, context): returns downloads by client, and the memory.
    weights: how much each client counts in the server's merge, in a few words for people.
    shape(shape): says which of a client's experts are generalists and which specialists, the budget
        kept as configured; and whether the others' expert is beside them, which is received as
        that, and never trained.
    trains(slot, round): whether a slot that is not frozen is trained in that round (from 1).
    mixing: "routed" by the router; "uniform": the mean of all experts; "sum": one expert, whose
        LoRA is their sum.
    on_top: whether specialists are on top of generalists, whose scale counts one of them, then.
    schedule: "alternating" trains the router by itself, every `router_every` local steps
        (bi-level); "joint" trains it with the experts on train; "both" does both.
    penalty(tensors, anchor): is added to the loss of local steps. The anchor is the tensors as the
        round began.
    after_training(tensors, anchor): returns what a client's tensors become between its training and
        its upload. Entries set to zero stay zero until a download writes them, for their optimiser
        moments are cleared.
    merges: whether a client adds every "update" it receives to a frozen (out, in) change of that
        linear ("merged").
    reinitializes: whether a client that merged an update draws its shared A anew as at the start,
        and sets B to zero.
    probe: the number of windows of its valid, drawn anew each round, on which a client compares
        models.
    looks, last_looks: how many times `mix`, and `finish`, measure at most.
    reads_peers: whether each client measures every other's upload (RoundContext.peer_nats).
    mix(own, download, nats): returns what a client writes of a download that it may weigh against
        its own tensors first, and how far towards the download that is. nats: on `probe` windows.
    finish(tensors, nats): returns what a client's tensors become at the very end, and which part of
        its model that is, where it is one alone, in the words of `Part` (runs/record.py); None
        where it is the whole. nats: on valid.
    centralized: whether one model is trained on the text of all clients, with as many times the
        batch, and everybody gets it.
    weighs: whether `aggregate` reads the weights of its context, and so `clients.NAME.weight`.
    averages: whether whatever `aggregate` makes of uploads goes through RoundContext.mean, which
        `upload.merge` can replace.
    note: what these settings make of the method that its name does not say, in a line for users.
    leaks: why what a client sends would say more of its text than noised sums do, where
        `privacy.level` is not "none"; "" where it does not.
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
    on_top: bool = False
    schedule: Schedule = "alternating"
    penalty: Callable[[Tensors, Tensors], Tensor] | None = None
    after_training: Callable[[Tensors, Tensors], Tensors] | None = None
    merges: bool = False
    reinitializes: bool = False
    probe: int = 0
    looks: int = 0
    last_looks: int = 0
    reads_peers: bool = False
    mix: Callable[[Tensors, Download, Nats], Mixed] | None = None
    finish: Callable[[Tensors, Nats], Finished] | None = None
    centralized: bool = False
    weighs: bool = False
    averages: bool = False
    note: str = ""
    leaks: str = "nobody has shown that what its clients send depends on noised sums alone"

    def beside_others(self, config: Config) -> bool:
        """Say whether a client has the others' expert beside its own."""
        return any(self.shape(config.shape_of(c)).others != "none" for c in config.clients)

    def sends(self, slot: Slot, round: int) -> bool:
        """Say whether a slot is in a client's upload in a round: it is shared, and was trained."""
        return self.shares(slot) and not slot.is_frozen and self.trains(slot, round)
