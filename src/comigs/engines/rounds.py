"""The round loop, once, over `exchange(task, downloads) -> replies`, whatever carries the messages."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from comigs.config import Config, Split
from comigs.engines.signs import failure_signs
from comigs.methods.method import Download, Facts, Memory, Method, Upload
from comigs.record import RunFolder
from comigs.slots import Slot

Event = Mapping[str, Any]  # a line of metrics.jsonl, or {"kind": "step", ...}, which is only shown
Report = Callable[[Event], None]


@dataclass(frozen=True)
class Task:
    """What the server asks of every client in one exchange, in this order: receive, evaluate, train, send.

    round: the round to train (from 1). train: False in the last exchange, which only delivers and evaluates.
    evaluate: splits to measure with the client's own model, as it is after the download of round - 1.
    evaluate_base: splits to measure with the base alone.
    """

    round: int
    train: bool
    evaluate: tuple[Split, ...]
    evaluate_base: tuple[Split, ...]


@dataclass(frozen=True)
class Reply:
    """What a client sends back.

    upload: None where it did not train. metrics: lines of metrics.jsonl; timing: its line of timings.jsonl.
    train_tokens: in its train split.
    """

    upload: Upload | None
    metrics: list[dict[str, Any]]
    timing: dict[str, Any] = field(default_factory=dict)
    train_tokens: int = 0


class Engine(Protocol):
    """Carries one exchange to all clients and back."""

    def exchange(self, task: Task, downloads: Mapping[str, Download]) -> dict[str, Reply]:
        """One message to each client and its reply, by client; of clients that are gone there is none."""

    def probe(self, uploads: Mapping[str, Upload], round: int) -> dict[str, dict[str, float]]:
        """reader -> author -> nats per token of the author's upload on a sample of the reader's valid."""

    def save(self) -> dict[str, Mapping[str, Tensor]]:
        """Clients' states by path in the run, where the engine holds them."""

    def restore(self, load: Callable[[str], dict[str, Tensor]]) -> None:
        """The inverse of `save`."""

    def personal(self) -> dict[str, Mapping[str, Tensor]]:
        """Clients' final tensors by path in the run, where the engine holds them."""


def run_rounds(config: Config, method: Method, engine: Engine, folder: RunFolder, report: Report) -> None:
    """From the folder's last commit to the end of the run. Each round is committed before the next begins."""
    last = folder.rewind()
    if last.finished:
        return
    history = folder.metrics()
    downloads: dict[str, Download] = {}
    memory: Memory = {}
    if last.round:
        engine.restore(lambda path: folder.load(_numbered(path, last.round)))
        downloads, memory = unpack_server(folder.load(_numbered("server/state", last.round)))

    for round in range(last.round + 1, config.rounds + 1):
        replies = engine.exchange(_task(config, round), downloads)
        uploads = {name: reply.upload for name, reply in replies.items() if reply.upload is not None}
        facts = Facts(
            clients=tuple(c.name for c in config.clients),
            train_tokens={name: reply.train_tokens for name, reply in replies.items()},
            peer_nats=engine.probe(uploads, round) if method.reads_peers else {},
        )
        merged, memory = method.aggregate(uploads, memory, facts)
        sent, downloads = downloads, next_downloads(downloads, merged, delivered=set(replies))

        metrics = [line for reply in replies.values() for line in reply.metrics]
        for line in metrics:
            if line["kind"] == "train":
                line |= traffic(line["client"], uploads, downloads, reads_peers=method.reads_peers)
        metrics.append({"kind": "server", "round": round, "drift": drift(uploads, sent)})
        metrics += failure_signs(history, metrics)
        history += metrics
        tensors = {**engine.save(), "server/state": pack_server(downloads, memory)}
        numbered = {_numbered(path, round): saved for path, saved in tensors.items()}
        folder.commit(round, metrics, [r.timing for r in replies.values()], numbered)
        for line in metrics:
            report(line)

    replies = engine.exchange(_task(config, config.rounds + 1), downloads)
    metrics = [line for reply in replies.values() for line in reply.metrics]
    metrics += failure_signs(history, metrics)
    folder.commit(config.rounds, metrics, [r.timing for r in replies.values()], engine.personal(), finished=True)
    for line in metrics:
        report(line)


def _task(config: Config, round: int) -> Task:
    """Evaluations of round r travel with the exchange of round r + 1, after its download: one message a round."""
    evaluation, is_last = config.evaluation, round == config.rounds + 1
    due = evaluation.every > 0 and round > 1 and (round - 1) % evaluation.every == 0
    watched = evaluation.splits if evaluation.every > 0 else ()
    splits = watched if due or is_last else ()
    return Task(
        round=round,
        train=not is_last,
        evaluate=tuple(dict.fromkeys((*splits, "test"))) if is_last else splits,
        evaluate_base=tuple(dict.fromkeys((*watched, "test"))) if round == 1 else (),
    )


def next_downloads(
    waiting: Mapping[str, Download], merged: Mapping[str, Download], delivered: Collection[str]
) -> dict[str, Download]:
    """What each client gets next: the newest of every slot that it has not had yet.

    waiting: what was to be delivered in this round. merged: what the server made of it. Updates, which are added and
    not written, wait in line behind those a client has missed.
    """
    downloads = dict(merged)
    for name in sorted(waiting.keys() - set(delivered)):
        missed, new = waiting[name], merged.get(name, {})
        downloads[name] = {**missed, **new, **_both_updates(missed, new)}
    return downloads


def _both_updates(missed: Download, new: Download) -> Download:
    """Two factored updates of one linear as one."""
    both = {slot for slot in missed.keys() & new.keys() if slot.role == "update"}
    return {slot: torch.cat([missed[slot], new[slot]], dim=0 if slot.matrix == "A" else 1) for slot in both}


def traffic(
    client: str, uploads: Mapping[str, Upload], downloads: Mapping[str, Download], reads_peers: bool
) -> dict[str, Any]:
    """What a client sent and gets in a round: bytes of the tensors' values, and what they were by role.

    reads_peers: it was also given every other client's upload, to measure it.
    """
    upload, download = uploads[client], downloads.get(client, {})
    peers = [u for name, u in uploads.items() if name != client] if reads_peers else []
    by_role: dict[str, dict[str, int]] = {}
    for slot, tensor in upload.items():
        sent = by_role.setdefault(slot.role, {"slots": 0, "bytes": 0})
        sent["slots"] += 1
        sent["bytes"] += tensor.nbytes
    return {
        "uploaded_bytes": sum(tensor.nbytes for tensor in upload.values()),
        "downloaded_bytes": sum(tensor.nbytes for given in (download, *peers) for tensor in given.values()),
        "uploaded_by_role": by_role,
    }


def drift(uploads: Mapping[str, Upload], sent: Mapping[str, Download]) -> float | None:
    """How far clients pull apart: mean distance of an upload from the mean upload, over the length of the mean's step.

    None in the first round, which starts from no download, and where clients share nothing or unequal shapes or none
    sent anything.
    """
    shapes = {frozenset((slot, t.shape) for slot, t in u.items()) for u in (*uploads.values(), *sent.values())}
    if not sent or not uploads or len(shapes) != 1 or not next(iter(shapes)):
        return None
    everyone = list(uploads.values())
    mean = {slot: sum(u[slot] for u in everyone) / len(everyone) for slot in everyone[0]}
    start = {slot: sum(d[slot] for d in sent.values()) / len(sent) for slot in mean}
    step = _distance(mean, start)
    apart = sum(_distance(upload, mean) for upload in everyone) / len(everyone)
    return apart / step if step > 0 else None


def _distance(a: Mapping[Slot, Any], b: Mapping[Slot, Any]) -> float:
    return math.sqrt(sum(float((a[slot] - b[slot]).square().sum()) for slot in a))


def pack_server(downloads: Mapping[str, Download], memory: Memory) -> dict[str, Tensor]:
    """What the server goes on from, as named tensors. A download that many clients get is kept once.

    Copies: views of one merged tensor, which a method may hand out, cannot be saved as they are.
    """
    distinct = list({id(d): d for d in downloads.values()}.values())
    packed = {f"memory/{key}": tensor for key, tensor in memory.items()}
    for number, download in enumerate(distinct):
        packed |= {f"download/{number}/{slot}": tensor for slot, tensor in download.items()}
    for name, download in downloads.items():
        packed[f"client/{name}"] = torch.tensor([d is download for d in distinct].index(True))
    return {key: tensor.clone() for key, tensor in packed.items()}


def unpack_server(packed: Mapping[str, Tensor]) -> tuple[dict[str, Download], Memory]:
    """The inverse of `pack_server`."""
    memory, distinct, chosen = {}, defaultdict[int, dict[Slot, Tensor]](dict), {}
    for key, tensor in packed.items():
        kind, _, rest = key.partition("/")
        if kind == "memory":
            memory[rest] = tensor
        elif kind == "download":
            number, _, slot = rest.partition("/")
            distinct[int(number)][Slot.parse(slot)] = tensor
        else:
            chosen[rest] = int(tensor)
    return {name: distinct[number] for name, number in chosen.items()}, memory


def _numbered(path: str, round: int) -> str:
    """clients/fr/experts -> clients/fr/round-0003.experts, so that a commit never overwrites the one before."""
    parent, _, name = path.rpartition("/")
    return f"{parent}/round-{round:04d}.{name}"
