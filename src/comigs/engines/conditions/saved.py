"""This module keeps a simulated network on the disk: its clock, and the answers on their way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from comigs.engines.conditions.merged import Merged
from comigs.engines.conditions.network import Answer, Network, Trip
from comigs.server.dispatch import Dispatcher, Out, Question
from comigs.server.protocol import Reply
from comigs.server.validation import read_reply
from comigs.slots import Slot

TABLE = "network"


def saved(network: Network, dispatcher: Dispatcher[Reply], merged: Merged) -> dict[str, Tensor]:
    """Return what a network goes on from, as named tensors: uploads, and all else as JSON."""
    # A round's files are gone with its commit, so what is on its way is in memory from then on.
    for client, trip in network.trips.items():
        if trip.answer is not None:
            network.trips[client] = replace(trip, answer=_in_memory(trip.answer))
    network.held = {client: _in_memory(answer) for client, answer in network.held.items()}

    tensors: dict[str, Tensor] = {}
    trips: dict[str, Any] = {}
    for client, trip in network.trips.items():
        trips[client] = [trip.id, trip.known, None, trip.lost]
        if trip.answer is not None:
            trips[client][2] = _packed(f"trip/{client}", trip.answer, tensors)
    held: dict[str, Any] = {}
    for client, answer in network.held.items():
        held[client] = _packed(f"held/{client}", answer, tensors)
    out: dict[str, Any] = {}
    for id, message in dispatcher.out.items():
        question = message.question
        out[id] = [question.client, question.round, message.size, message.started, message.ends]
    told = {"time": network.time, "trips": trips, "held": held, "out": out}
    told["merged"] = merged.saved()
    raw = json.dumps(told, allow_nan=False).encode()
    return tensors | {TABLE: torch.tensor(list(raw), dtype=torch.uint8)}


def unsaved(
    tensors: Mapping[str, Tensor],
    network: Network,
    dispatcher: Dispatcher[Reply],
    merged: Merged,
) -> None:
    """Put network, dispatcher and what was merged where they were when `saved` was called."""
    told = json.loads(bytes(tensors[TABLE].tolist()))
    network.time = told["time"]
    merged.restore(told.get("merged", {}))  # older runs have none
    for client, (id, known, answer, lost) in told["trips"].items():
        kept = None if answer is None else _unpacked(f"trip/{client}", answer, tensors)
        network.trips[client] = Trip(id, client, known, kept, lost)
    for client, answer in told["held"].items():
        network.held[client] = _unpacked(f"held/{client}", answer, tensors)
    for id, (client, round, size, started, ends) in told["out"].items():
        asked = Question[Reply](client, round, lambda: None, lambda reply, _: reply)
        dispatcher.out[id] = Out(asked, size, started, ends)


def _in_memory(answer: Answer) -> Answer:
    upload = answer.reply.upload
    kept = replace(answer.reply, upload=None if upload is None else dict(upload))
    return replace(answer, reply=kept)


def _packed(name: str, answer: Answer, tensors: dict[str, Tensor]) -> list[Any]:
    """Return an answer as JSON has it, with its tensors added to `tensors`."""
    reply, (lines, timing) = answer.reply, read_reply(answer.reply)
    for number, (slot, tensor) in enumerate((reply.upload or {}).items()):
        tensors[f"{name}/{number}/{slot}"] = tensor
    metrics = [line.as_json() for line in lines]
    told = [metrics, timing.as_json(), reply.train_tokens, reply.round, reply.upload is not None]
    return [*told, answer.uploaded_bytes, answer.ready]


def _unpacked(name: str, told: list[Any], tensors: Mapping[str, Tensor]) -> Answer:
    metrics, timing, tokens, round, has_upload, uploaded, ready = told
    numbered = {}
    for key, tensor in tensors.items():
        if key.startswith(f"{name}/"):
            number, _, slot = key.removeprefix(f"{name}/").partition("/")
            numbered[int(number)] = Slot.parse(slot), tensor.clone()
    upload = dict(numbered[number] for number in sorted(numbered)) if has_upload else None
    return Answer(Reply(upload, metrics, timing, tokens, round), uploaded, ready)
