"""Every upload is held against what was asked for before it counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from statistics import median

from pydantic import ValidationError
from torch import Tensor

from comigs.config import Config, ExpertShape, UploadSection
from comigs.experts.attach import Attachment
from comigs.experts.init import starting_tensors
from comigs.methods.method import Download, Method, Upload
from comigs.runs.metrics import METRICS, Timing
from comigs.server.protocol import Reply, Task
from comigs.slots import Shapes, Slot

Start = Callable[[Slot, tuple[int, ...]], Tensor]
ENOUGH = 3  # uploads from which on their median says what is usual


def shapes_of_clients(config: Config, method: Method, attachment: Attachment) -> dict[str, Shapes]:
    """Every tensor of every client. Clients with equal experts share one mapping."""
    kinds: dict[ExpertShape, Shapes] = {}
    shapes = {}
    for client in config.clients:
        shape = method.shape(config.shape_of(client))
        if shape not in kinds:
            kinds[shape] = attachment.slot_shapes(shape, method.mixing == "routed", method.merges)
        shapes[client.name] = kinds[shape]
    return shapes


def expected_upload(method: Method, shapes: Shapes, round: int) -> Shapes:
    """What a client sends in that round."""
    return {slot: dims for slot, dims in shapes.items() if method.sends(slot, round)}


def check_upload(upload: Upload, expected: Shapes) -> str | None:
    """What is wrong with it, in a few words: other slots or shapes than expected, not floating or
    not finite.
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
    """What a shared tensor is before any training, on every client; drawn once."""
    return cache(lambda slot, dims: starting_tensors({slot: dims}, seed, "")[slot])


def step_length(upload: Upload, download: Download, start: Start) -> float:
    """How far an upload is from the download, or from the common start where a tensor is not in the
    download.
    """
    squares = 0.0
    for slot, tensor in upload.items():
        origin = download[slot] if slot in download else start(slot, tuple(tensor.shape))
        squares += float((tensor.double() - origin.to(tensor.device)).square().sum())
    return math.sqrt(squares)


def too_long(lengths: Mapping[str, float], limits: UploadSection) -> dict[str, str]:
    """client -> why its step is too long to count, in a few words."""
    most = {"max_norm": limits.max_norm} if limits.max_norm is not None else {}
    usual = median(lengths.values()) if len(lengths) >= ENOUGH else 0.0
    if usual > 0:
        most["max_norm_ratio"] = limits.max_norm_ratio * usual
    return {
        client: f"a step of length {length:.3g}, above {limit:.3g} (upload.{name})"
        for name, limit in most.items()
        for client, length in lengths.items()
        if length > limit
    }


def check_lines(reply: Reply, client: str, task: Task | None = None) -> str | None:
    """What is wrong with the lines of a client's reply, in a few words that hold nothing of them.

    They are what a client writes, about itself and the round that it answers, and about an upload
    if there is one.
    task: what it was asked, where that is known; then it has measured just that.
    """
    try:
        lines, timing = METRICS.validate_python(reply.metrics), Timing.model_validate(reply.timing)
    except ValidationError:
        return "metrics that are not as they should be"
    measured = [(line.model, line.split) for line in lines if line.kind == "evaluation"]
    due = {"train": reply.round, "base": 0, "personal": reply.round - 1}
    rounds = [
        line.round == due[line.kind if line.kind == "train" else line.model] for line in lines
    ]
    trainings = len(lines) - len(measured)
    fits = (
        all(rounds)
        and timing.round == reply.round
        and {line.client for line in (timing, *lines)} == {client}
        and trainings == (reply.upload is not None)
    )
    if fits and task is not None:
        asked = [
            *(("base", split) for split in task.evaluate_base),
            *(("personal", split) for split in task.evaluate),
        ]
        fits = reply.round == task.round and sorted(measured) == sorted(asked)
    return None if fits else "metrics of something else than it was asked for"
