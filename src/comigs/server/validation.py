"""The door of the server: whatever a client sends is held against what was asked of it.

An upload must have the slots and shapes that were asked for, finite numbers, and a step no longer
than is usual. A reply's lines must be exactly what a client writes, about itself and the round that
it answers. What is wrong is said in a few words that hold nothing of what came.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from statistics import median

from torch import Tensor

from comigs.config import Config, ExpertShape, UploadSection
from comigs.experts.attach import Attachment
from comigs.experts.init import starting_tensors
from comigs.methods.method import Download, Method, Upload
from comigs.runs.metrics import REPORTED, ClientReport, Evaluation, Kept, Timing
from comigs.runs.record import Record
from comigs.server.protocol import Reply, Task
from comigs.slots import Shapes, Slot

Start = Callable[[Slot, tuple[int, ...]], Tensor]
SHARES = 16  # for each tensor of a client: one may have more specialists than the server knows of
ENOUGH = 3  # uploads from which on their median says what is usual
# A client writes every field but these: the server measures a device's messages itself.
OTHERS = {"kind", "received_bytes", "sent_bytes", "sent_nats_per_token", "sent_tokens", "epsilon"}
OTHERS |= {"kept_part"}
SCORES = ("nats_per_token", "perplexity", "bits_per_byte", "tokens", "bytes")
MEASURED = (*SCORES, "seconds", "peak_memory_bytes")


def shapes_of_clients(config: Config, method: Method, attachment: Attachment) -> dict[str, Shapes]:
    """Return the shape of every tensor of every client.

    Clients with equal experts share one mapping.
    """
    kinds: dict[ExpertShape, Shapes] = {}
    shapes = {}
    for client in config.clients:
        shape = method.shape(config.shape_of(client))
        if shape not in kinds:
            kinds[shape] = attachment.slot_shapes(shape, method.mixing == "routed", method.merges)
        shapes[client.name] = kinds[shape]
    return shapes


def expected_upload(method: Method, shapes: Shapes, round: int) -> Shapes:
    """Return the slots and shapes that a client sends in that round."""
    return {slot: dims for slot, dims in shapes.items() if method.sends(slot, round)}


def check_upload(upload: Upload, expected: Shapes) -> str | None:
    """Return what is wrong with an upload, in a few words, or None.

    Wrong are other slots or shapes than expected, and numbers that are not floating or not finite.
    """
    if extra := sorted(upload.keys() - expected.keys()):
        return f"not asked for: {extra[0]}"
    for slot, dims in expected.items():
        if slot not in upload:
            return f"missing: {slot}"
        tensor = upload[slot]
        if tuple(tensor.shape) != dims:
            return f"shape {tuple(tensor.shape)} instead of {dims}: {slot}"
        if not tensor.is_floating_point():
            return f"{str(tensor.dtype).removeprefix('torch.')} instead of floating: {slot}"
        if not bool(tensor.isfinite().all()):
            return f"not finite: {slot}"
    return None


def common_start(seed: int) -> Start:
    """Return a function that draws a shared tensor as it is before any training, on every client.

    Each tensor is drawn once.
    """
    return cache(lambda slot, dims: starting_tensors({slot: dims}, seed, "")[slot])


def origin_of(download: Download, expected: Shapes, start: Start) -> dict[Slot, Tensor]:
    """Return what an upload with the slots of `expected` is a step away from: the download, or the
    common start where a tensor is not in the download.
    """
    origin = {}
    for slot, dims in expected.items():
        origin[slot] = download[slot] if slot in download else start(slot, dims)
    return origin


def shapes_of(tensors: Mapping[Slot, Tensor]) -> Shapes:
    """Return the shape of each tensor."""
    return {slot: tuple(tensor.shape) for slot, tensor in tensors.items()}


def step_length(upload: Upload, download: Download, start: Start) -> float:
    """Return how far an upload is from where it began."""
    squares, origin = 0.0, origin_of(download, shapes_of(upload), start)
    for slot, tensor in upload.items():
        squares += float((tensor.double() - origin[slot].to(tensor.device)).square().sum())
    return math.sqrt(squares)


def too_long(lengths: Mapping[str, float], limits: UploadSection) -> dict[str, str]:
    """Return the clients whose step is too long to count: client -> why, in a few words."""
    most: dict[str, float] = {}
    if limits.max_norm is not None:
        most["max_norm"] = limits.max_norm
    # What is usual is known from several clients that have moved, and from nothing else.
    usual = median(lengths.values()) if len(lengths) >= ENOUGH else 0.0
    if usual > 0:
        most["max_norm_ratio"] = limits.max_norm_ratio * usual
    refused = {}
    for name, limit in most.items():
        for client, length in lengths.items():
            if length > limit:
                step = f"a step of length {length:.3g}"
                refused[client] = f"{step}, above {limit:.3g} (upload.{name})"
    return refused


def read_reply(reply: Reply, private: bool = False) -> tuple[list[ClientReport], Timing]:
    """Return the lines of a reply and its timing. private: it may say nothing that is measured.

    Raises ValueError unless they are exactly what a client writes: no other fields, nothing left
    out, nothing unmeasured, and every figure finite and no larger than anybody needs.
    """
    lines, timing = REPORTED.validate_python(reply.metrics), Timing.model_validate(reply.timing)
    records: list[Record] = [*lines, timing]
    for record in records:
        left_out = type(record).model_fields.keys() - record.model_fields_set - OTHERS
        unmeasured = any(getattr(record, name, 0) is None for name in MEASURED)
        if left_out or (unmeasured and not (private and record is timing)):
            raise ValueError("a field is missing")
    return lines, timing


def most_figures(config: Config, shapes: Shapes) -> int:
    """Return how many figures the lists of one line of a client may have: they stay in memory."""
    return config.client.steps + SHARES * len(shapes)


def _figures(line: Record) -> int:
    count = 0
    for value in vars(line).values():
        for each in value if isinstance(value, list) else ():
            count += len(each) if isinstance(each, list) else 1
    return count


def check_lines(
    reply: Reply,
    client: str,
    task: Task | None = None,
    keeps: bool = False,
    private: bool = False,
    most: float = math.inf,
) -> str | None:
    """Return what is wrong with the lines of a client's reply, or None.

    They are what a client writes, about itself and the round that it answers, and about an upload
    if there is one. task: what the client was asked, where that is known; then it has measured just
    that. keeps: it says which round's model it keeps, and what that comes to on test. private: what
    it has measured may stay with it, all of it. most: figures that a line's lists may have.
    """
    try:
        lines, timing = read_reply(reply, private)
    except ValueError:
        return "metrics that are not as they should be"
    if any(_figures(line) > most for line in lines):
        return "metrics with more figures than there can be"

    # A client speaks of itself and of this exchange only; it cannot report for another one.
    goes_on = reply.upload is not None or (task is not None and task.train)
    due = {"base": 0, "personal": reply.round - 1}
    measured, trainings, kept = [], 0, 0
    fits = timing.round == reply.round and timing.client == client
    for line in lines:
        fits = fits and line.client == client
        if isinstance(line, Evaluation | Kept) and line.kept_part is not None:
            # One part of its own model may be left at the very end.
            fits = fits and not goes_on and line.model == "personal"
        if isinstance(line, Evaluation):
            measured.append((line.model, line.split))
            fits = fits and line.round == due[line.model]
        elif isinstance(line, Kept):
            kept += 1
            is_a_round = 1 <= line.round < reply.round
            fits = fits and is_a_round and (line.split, line.model) == ("test", "personal")
        else:
            trainings += 1
            fits = fits and line.round == reply.round
    silent = private and not measured and not kept
    fits = fits and trainings == (reply.upload is not None) and (kept == keeps or silent)

    # Nothing that was asked for is left out, and nothing is added.
    if fits and task is not None:
        asked = [("base", split) for split in task.evaluate_base]
        asked += [("personal", split) for split in task.evaluate]
        fits = reply.round == task.round and (silent or sorted(measured) == sorted(asked))
    return None if fits else "metrics of something else than it was asked for"
