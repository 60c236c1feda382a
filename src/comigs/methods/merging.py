"""This module holds what servers make of uploads: means, and pairs of LoRA factors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from torch import Tensor

from comigs.methods.lowrank import Pair
from comigs.slots import Slot

if TYPE_CHECKING:
    from comigs.methods.method import Download, Memory, RoundContext, Upload

Key = TypeVar("Key")
Place = tuple[int, str, str]  # layer, site and part of a LoRA


def mean_of_uploads(
    uploads: Mapping[str, Upload], memory: Memory, context: RoundContext
) -> tuple[dict[str, Download], Memory]:
    """Return the mean over clients, slot by slot, the same for all (1602.05629, equal weights)."""
    return dict.fromkeys(context.clients, context.mean(uploads.values())), memory


def mean(
    uploads: Iterable[Mapping[Key, Tensor]],
    how: Literal["mean", "trimmed", "median"] = "mean",
    trim: float = 0.25,
) -> dict[Key, Tensor]:
    """Return the mean of uploads slot by slot, or what stands for it. Empty without uploads.

    "trimmed" leaves out the `trim` largest and smallest of n values of each number (floor(trim * n)
    at either end); "median" all but the middle one, or two. Sums are in float64, so that the mean
    is independent of the clients' order and exact for equal uploads.
    """
    if how == "mean":
        return _running_mean(uploads)
    given = list(uploads)
    if not given:
        return {}
    cut = (len(given) - 1) // 2 if how == "median" else int(trim * len(given))
    middle = {}
    for slot, tensor in given[0].items():
        values_N = torch.stack([upload[slot].to(torch.float64) for upload in given])
        kept_N = values_N.sort(dim=0).values[cut : len(given) - cut]
        middle[slot] = kept_N.mean(dim=0).to(tensor.dtype)
    return middle


def _running_mean(uploads: Iterable[Mapping[Key, Tensor]]) -> dict[Key, Tensor]:
    """Return the mean with one upload in memory at a time."""
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


def pairs(tensors: Mapping[Slot, Tensor]) -> dict[Place, Pair]:
    """Return (A, B) of every LoRA in `tensors`, in float64."""
    found = {}
    for slot, A in tensors.items():
        if slot.matrix == "A":
            place = (slot.layer, slot.site, slot.part)
            found[place] = (A.to(torch.float64), tensors[Slot(*place, "B")].to(torch.float64))
    return found


def slots(place: Place, pair: Pair, like: Tensor) -> dict[Slot, Tensor]:
    """Return one of `pairs` as tensors by slot, with the dtype and device of `like`."""
    return {Slot(*place, "A"): pair[0].to(like), Slot(*place, "B"): pair[1].to(like)}
