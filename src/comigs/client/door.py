"""The client's door: private tensors never pass it, and nothing comes in that does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from comigs.methods.method import Method, Tensors
from comigs.slots import Slot

Weights = Sequence[Sequence[float]]  # routing weights, by block and expert
NEAR = 1e-6  # of a sum of weights to 1
PRIVATE = ("specialist", "router")  # these roles neither leave a client nor come from elsewhere


def checked_prior(client: str, prior: Weights | None, own: Tensors) -> Tensor | None:
    """Return a prior of mean routing weights (blocks, experts); None where there is none.

    It is passed over where it is for another number of experts, as a client may have gained or lost
    one since. Raises AssertionError where its weights are none.
    """
    routers = [tensor for slot, tensor in own.items() if slot.role == "router" and not slot.is_gate]
    sizes = [len(weights_E) for weights_E in prior or ()]
    if prior is None or sizes != [len(router_ED) for router_ED in routers] or not routers:
        return None
    prior_LE = torch.tensor(prior, dtype=torch.float64, device=routers[0].device)
    if not bool((prior_LE >= 0).all()) or not bool((prior_LE.sum(dim=1) - 1).abs().max() < NEAR):
        raise AssertionError(f"{client}: a prior whose weights do not sum to 1")
    return prior_LE


def require_receivable(client: str, method: Method, given: Tensors, own: Tensors) -> None:
    """Refuse a download, or others' uploads, that a client with the tensors `own` must not take.

    Raises AssertionError, since a server that sends it is broken or lies.
    """
    for slot, tensor in given.items():
        if not method.receives(slot):
            raise AssertionError(f"{client}: a download may not touch {slot}")
        _require_fitting(client, slot, tensor, own)
        if slot.role == "update":
            A, B = (given.get(replace(slot, matrix=matrix)) for matrix in "AB")
            if A is None or B is None or len(A) != B.shape[1]:
                raise AssertionError(f"{client}: {slot} of the download has no other half")


def _require_fitting(client: str, slot: Slot, tensor: Tensor, own: Tensors) -> None:
    # An update is a factor A (rank, in) or B (out, rank) of any rank, for a change (out, in).
    place = slot
    if slot.role == "update":
        place = Slot(slot.layer, slot.site, "merged", "W")
    if slot.role in PRIVATE or place not in own:
        raise AssertionError(f"{client}: a download may not touch {slot}")
    given, expected = tuple(tensor.shape), tuple(own[place].shape)
    if slot.role == "update" and slot.matrix == "A":
        given, expected = given[1:2], expected[1:2]
    elif slot.role == "update":
        given, expected = given[:1], expected[:1]
    if given != expected:
        raise AssertionError(f"{client}: {slot} of the download has another shape")
    if not bool(tensor.isfinite().all()):
        raise AssertionError(f"{client}: {slot} of the download is not finite")
