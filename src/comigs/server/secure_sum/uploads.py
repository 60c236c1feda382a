"""This module makes whole numbers of an upload, for a sum, and of the sum the mean of the uploads.

What is summed is each client's step away from its download, or from the common start where a tensor
was in no download. The step is cut to `upload.max_norm`, as the server cannot look at it any more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from comigs.config import Config, UploadSection
from comigs.methods.merging import mean
from comigs.methods.method import Download, Upload
from comigs.server.secure_sum.fixed_point import from_steps, to_steps
from comigs.server.secure_sum.primitives import SumError
from comigs.server.validation import common_start, origin_of
from comigs.server.wire import as_received
from comigs.slots import Shapes, Slot

# Without upload.max_norm no number goes further than this in a round: a LoRA's numbers are below
# 1, and AdamW moves one by about its learning rate a step.
REACH = 1.0
# Of max_norm: what rounding adds to a sum then never makes its mean longer than allowed.
CUT = 0.999


def bound_of(limits: UploadSection) -> float:
    """Return how far a number of an upload may be from the download at most."""
    return REACH if limits.max_norm is None else limits.max_norm


def origins_of(
    config: Config, downloads: Mapping[str, Download], expected: Shapes
) -> dict[str, Download]:
    """Return what each client's upload is a step away from, by client.

    downloads: by client, as the server has them. expected: the slots of an upload.
    """
    # Clients that were sent one and the same download start from one and the same.
    start, begun = common_start(config.seed), dict[int, Download]()
    origins: dict[str, Download] = {}
    for name, download in downloads.items():
        if id(download) not in begun:
            received = as_received(download, config.upload.format)
            begun[id(download)] = origin_of(received, expected, start)
        origins[name] = begun[id(download)]
    return origins


def to_sum(upload: Upload, origin: Download, limits: UploadSection, members: int) -> np.ndarray:
    """Return an upload's step as whole numbers, slot by slot in their order: (N,) uint32.

    Raises SumError where a number is NaN or infinite.
    """
    pieces = []
    for slot in sorted(upload):
        step = upload[slot].to("cpu", torch.float64) - origin[slot].to("cpu", torch.float64)
        pieces.append(step.reshape(-1).numpy())
    values = np.concatenate(pieces)
    length = math.sqrt(float(values @ values))
    if not math.isfinite(length):
        raise SumError("an upload that is not finite")
    most = math.inf if limits.max_norm is None else CUT * limits.max_norm
    if length > most:
        values *= most / length
    return to_steps(values, bound_of(limits), members)


def mean_of(
    total: np.ndarray,
    origins: Iterable[Mapping[Slot, Tensor]],
    limits: UploadSection,
    members: int,
) -> dict[Slot, Tensor]:
    """Return the mean of uploads from the sum of their steps: float32, in the order of the origins.

    total: (N,) uint32. origins: of each client that is in the sum. members: of the session.
    """
    origins = list(origins)
    middle = mean(origins)
    values = from_steps(total, bound_of(limits), members) / len(origins)
    made: dict[Slot, Tensor] = {}
    begin = 0
    for slot in sorted(middle):
        end = begin + middle[slot].numel()
        step = torch.from_numpy(values[begin:end].copy()).reshape(middle[slot].shape)
        made[slot] = (middle[slot].to("cpu", torch.float64) + step).to(torch.float32)
        begin = end
    return {slot: made[slot] for slot in middle}
