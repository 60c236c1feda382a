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
from comigs.errors import UserError
from comigs.methods.method import Upload
from comigs.server.dispatch import Dispatcher, Out, Question
from comigs.server.protocol import Reply
from comigs.server.validation import read_reply
from comigs.slots import Slot

TABLE = "network"
FORMAT = 2  # of the table; the first had positions instead of names


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
        told: dict[str, Any] = {"id": trip.id, "known": trip.known, "lost": trip.lost}
        told["answer"] = None
        if trip.answer is not None:
            told["answer"] = _packed(f"trip/{client}", trip.answer, tensors)
        trips[client] = told
    held: dict[str, Any] = {}
    for client, answer in network.held.items():
        held[client] = _packed(f"held/{client}", answer, tensors)

    # A question is asked again in its own words; here it is enough to know whose it is.
    out: dict[str, Any] = {}
    for id, message in dispatcher.out.items():
        question = {"client": message.question.client, "round": message.question.round}
        sent = {"size": message.size, "started": message.started, "ends": message.ends}
        out[id] = question | sent
    whole = {"format": FORMAT, "time": network.time, "trips": trips, "held": held, "out": out}
    whole["merged"] = merged.saved()
    raw = json.dumps(whole, allow_nan=False).encode()
    return tensors | {TABLE: torch.tensor(list(raw), dtype=torch.uint8)}


def unsaved(
    tensors: Mapping[str, Tensor],
    network: Network,
    dispatcher: Dispatcher[Reply],
    merged: Merged,
) -> None:
    """Put network, dispatcher and what was merged where they were when `saved` was called.

    Raises UserError where another version of comigs has written it.
    """
    told = json.loads(bytes(tensors[TABLE].tolist()))
    if told.get("format") != FORMAT:
        raise UserError(
            "conditions: what is on its way in this run was written by another version of comigs; "
            "go on with that one, or start a new run"
        )

    # the clock and what clients have, then what is on its way to the server, then to clients
    network.time = told["time"]
    merged.restore(told["merged"])
    for client, trip in told["trips"].items():
        answer = None
        if trip["answer"] is not None:
            answer = _unpacked(f"trip/{client}", trip["answer"], tensors)
        network.trips[client] = Trip(trip["id"], client, trip["known"], answer, trip["lost"])
    for client, answer in told["held"].items():
        network.held[client] = _unpacked(f"held/{client}", answer, tensors)
    for id, sent in told["out"].items():
        asked = Question[Reply](sent["client"], sent["round"], lambda: None, lambda reply, _: reply)
        dispatcher.out[id] = Out(asked, sent["size"], sent["started"], sent["ends"])


def _in_memory(answer: Answer) -> Answer:
    upload = answer.reply.upload
    kept = replace(answer.reply, upload=None if upload is None else dict(upload))
    return replace(answer, reply=kept)


def _packed(name: str, answer: Answer, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return an answer as JSON has it, with its tensors added to `tensors`."""
    reply, (lines, timing) = answer.reply, read_reply(answer.reply)
    for number, (slot, tensor) in enumerate((reply.upload or {}).items()):
        tensors[f"{name}/{number}/{slot}"] = tensor
    return {
        "metrics": [line.as_json() for line in lines],
        "timing": timing.as_json(),
        "train_tokens": reply.train_tokens,
        "round": reply.round,
        "has_upload": reply.upload is not None,
        "uploaded_bytes": answer.uploaded_bytes,
        "ready": answer.ready,
    }


def _unpacked(name: str, told: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Answer:
    numbered = {}
    for key, tensor in tensors.items():
        if key.startswith(f"{name}/"):
            number, _, slot = key.removeprefix(f"{name}/").partition("/")
            numbered[int(number)] = Slot.parse(slot), tensor.clone()
    upload: Upload | None = None
    if told["has_upload"]:
        upload = dict(numbered[number] for number in sorted(numbered))
    reply = Reply(upload, told["metrics"], told["timing"], told["train_tokens"], told["round"])
    return Answer(reply, told["uploaded_bytes"], told["ready"])
