"""A slot is the typed address of a trainable tensor.

Sharing, saving and merging go by slot, never by the name of a parameter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Role = Literal["generalist", "specialist", "rest", "router", "attention", "update", "merged"]
SPELLING = re.compile(
    r"(0|[1-9][0-9]*)\.(\w+)\.([gs](?:0|[1-9][0-9]*)|rest|router|attention|update|merged)\.([ABW])"
)
OTHERS: Literal["rest"] = "rest"
"""The part that holds the others' generalist. Stored files call it the "rest" (of the world)."""


@dataclass(frozen=True, order=True)
class Slot:
    """A slot says where one trainable tensor sits.

    layer: the index of the transformer block, from 0.
    site: the frozen linear that the tensor adds to: an MLP linear ("up", "gate", "down"), an
        attention linear ("q", "c_attn", ...), or "mlp" for the router, which reads the MLP's input.
    part: "g0", "g1", ... (generalists), "s0", "s1", ... (specialists), "rest" (the others' mean
        generalists, as one, which this client never trains), "router" or "attention". Methods that
        merge have two more: "update" is a factored change of the frozen linear, only in downloads;
        "merged" is the sum of all updates so far.
    matrix: "A" (rank, in); "B" (out, rank); "W", a router's (experts, width) or what is merged
        (out, in). The "B" of a router, (1,), is its gate: how far the router is open to the others,
        from 0 to 1.
    """

    layer: int
    site: str
    part: str
    matrix: str

    @property
    def role(self) -> Role:
        """The kind of part, which alone decides whether a tensor may leave its client."""
        if re.fullmatch(r"[gs]\d+", self.part):
            return "generalist" if self.part.startswith("g") else "specialist"
        return self.part  # type: ignore[return-value]

    @property
    def is_gate(self) -> bool:
        """Whether the tensor is the gate of a router: how far it is open to the others."""
        return self.part == "router" and self.matrix == "B"

    @property
    def is_frozen(self) -> bool:
        """Whether no method trains the tensor: what is merged, the others, and a router's gate."""
        return self.role in ("merged", OTHERS) or self.is_gate

    def __str__(self) -> str:
        return f"{self.layer}.{self.site}.{self.part}.{self.matrix}"

    @classmethod
    def parse(cls, text: str) -> Slot:
        """Read what `str(slot)` has written. Raises ValueError for anything else."""
        match = SPELLING.fullmatch(text)
        if match is None:
            raise ValueError(f'"{text}" is no slot: expected LAYER.SITE.PART.MATRIX')
        layer, site, part, matrix = match.groups()
        return cls(int(layer), site, part, matrix)


Shapes = Mapping[Slot, tuple[int, ...]]


def num_specialists(names: Iterable[str]) -> int:
    """Return how many specialists a client has, by the names of its saved tensors."""
    slots = map(Slot.parse, names)
    return len({slot.part for slot in slots if slot.role == "specialist"})


def expert_parts(generalists: int, specialists: int, others: bool = False) -> list[str]:
    """Return the parts of a client's experts in the router's order, the others' last."""
    parts = [f"g{i}" for i in range(generalists)] + [f"s{i}" for i in range(specialists)]
    return [*parts, OTHERS] if others else parts


def experts_of(parts: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the experts that a router weighs, in its order, as the parts that each is the sum of.

    Each part is an expert. Beside the others' generalist, a client's own expert is its generalists
    with one of its specialists on top of them, or none.
    """
    if OTHERS not in parts:
        return [(part,) for part in parts]
    generalists = tuple(part for part in parts if part.startswith("g"))
    specialists = [part for part in parts if part.startswith("s")]
    own = [(*generalists, specialist) for specialist in specialists] or [generalists]
    return [*own, (OTHERS,)]
