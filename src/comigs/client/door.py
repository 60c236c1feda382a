"""The client's door: private tensors never pass it, and nothing comes in that does not fit."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from comigs.slots import Slot

PRIVATE = ("specialist", "router")  # these roles neither leave a client nor come from elsewhere


def require_receivable(client: str, slot: Slot, tensor: Tensor, own: Mapping[Slot, Tensor]) -> None:
    """Refuse a tensor of a download that a client with the tensors `own` must not or cannot write.

    Raises AssertionError, since a server that sends it is broken or lies.
    """
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
