"""This module holds what methods make of a client's experts, and what they share of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from comigs.config import Config, ExpertShape
from comigs.errors import UserError
from comigs.slots import OTHERS, Slot

Shape = Callable[[ExpertShape], ExpertShape]  # of `Method.shape`


def as_configured(shape: ExpertShape) -> ExpertShape:
    """Return the experts as they are."""
    return shape


def one_expert(role: Literal["generalist", "specialist"]) -> Shape:
    """Make a shape that is a single expert of all ranks together (two of rank 8: one of 16)."""

    def shape(shape: ExpertShape) -> ExpertShape:
        total = shape.generalists * shape.rank + shape.specialists * shape.specialist_rank
        generalists = int(role == "generalist")
        counts = {"generalists": generalists, "specialists": 1 - generalists}
        return shape.model_copy(update={**counts, "rank": total, "specialist_rank": total})

    return shape


def beside_others(router: Literal["open", "gated"]) -> Shape:
    """Make a shape that is a single generalist of all ranks, and the others' beside it."""
    return lambda shape: one_expert("generalist")(shape).model_copy(update={"others": router})


def on_top(shape: ExpertShape) -> ExpertShape:
    """Put specialists on top of the generalists, and the others' generalists beside both."""
    return shape.model_copy(update={"others": "gated"}) if shape.generalists else shape


def others_of(tensors: Mapping[Slot, Tensor]) -> dict[Slot, Tensor]:
    """Return the generalists of `tensors` as the others' expert: one of all their ranks."""
    by_slot: dict[Slot, list[Tensor]] = {}
    for slot in sorted(slot for slot in tensors if slot.role == "generalist"):
        by_slot.setdefault(replace(slot, part=OTHERS), []).append(tensors[slot])
    along = {"A": 0, "B": 1}  # where a LoRA's ranks are
    return {slot: torch.cat(found, dim=along[slot.matrix]) for slot, found in by_slot.items()}


def shares_all(slot: Slot) -> bool:
    """Say of `Method.shares` or `receives`: every generalist and the attention LoRA."""
    return slot.role in ("generalist", "attention")


def require_generalists(config: Config) -> None:
    """Refuse to do without generalists where a method is about what is shared beside what is not.

    Raises UserError naming the field.
    """
    if config.experts.generalists == 0:
        raise UserError(
            f"experts.generalists: given 0, but {config.method} is a shared expert beside one that "
            "stays home; must be 1 or more (comigs takes 0)"
        )


def require_equal(
    config: Config,
    field: Literal["rank", "num_experts"],
    why: str,
    shape: Shape = as_configured,
) -> None:
    """Refuse clients whose experts differ in `field` after `shape`.

    Raises UserError naming two of them.
    """
    values = {c.name: getattr(shape(config.shape_of(c)), field) for c in config.clients}
    first = next(iter(values))
    for name, value in values.items():
        if value != values[first]:
            raise UserError(
                f"clients.{name}: {field} {value}, but {first} has {values[first]}; {why}"
            )
