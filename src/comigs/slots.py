"""The typed address of every trainable tensor. Sharing, saving and merging go by slot, never by
parameter name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Role = Literal["generalist", "specialist", "rest", "router", "attention", "update", "merged"]
SPELLING = re.compile(
    r"(0|[1-9][0-9]*)\.(\w+)\.([gs](?:0|[1-9][0-9]*)|rest|router|attention|update|merged)\.([ABW])"
)


@dataclass(frozen=True, order=True)
class Slot:
    """Where one trainable tensor sits.

    layer: index of the transformer block, from 0.
    site: the frozen linear it adds to: an MLP linear ("up", "gate", "down"), an attention linear
        ("q", "c_attn", ...), or "mlp" for the router, which reads the MLP's input.
    part: "g0", "g1", ... (generalists), "s0", "s1", ... (specialists), "rest" (of the world: the
        others' generalist, which this client never trains), "router" or "attention". In methods
        that merge: "update", only in downloads, a factored change of the frozen linear; "merged",
        the sum of all updates so far.
    matrix: "A" (rank, in), "B" (out, rank), or "W": (experts, width) of a router, (out, in) of what
        is merged. "B" of a router, (1,): how far it is open to the rest of the world, from 0 to 1.
    """

    layer: int
    site: str
    part: str
    matrix: str

    @property
    def role(self) -> Role:
        """What the part is: the one thing that decides whether a tensor may leave a client."""
        if re.fullmatch(r"[gs]\d+", self.part):
            return "generalist" if self.part.startswith("g") else "specialist"
        return self.part  # type: ignore[return-value]

    @property
    def is_gate(self) -> bool:
        """It is how far a router is open to the rest of the world."""
        return self.part == "router" and self.matrix == "B"

    @property
    def is_frozen(self) -> bool:
        """No method trains it: what is merged, the rest of the world, and how far a router is open
        to that.
        """
        return self.role in ("merged", "rest") or self.is_gate

    def __str__(self) -> str:
        return f"{self.layer}.{self.site}.{self.part}.{self.matrix}"

    @classmethod
    def parse(cls, text: str) -> Slot:
        """The inverse of `str(slot)`. Raises ValueError for anything else."""
        match = SPELLING.fullmatch(text)
        if match is None:
            raise ValueError(f'"{text}" is no slot: expected LAYER.SITE.PART.MATRIX')
        layer, site, part, matrix = match.groups()
        return cls(int(layer), site, part, matrix)


Shapes = Mapping[Slot, tuple[int, ...]]


def expert_parts(generalists: int, specialists: int, rest: bool = False) -> list[str]:
    """Names of a client's experts in the router's order: generalists, specialists, the rest of the
    world.
    """
    return (
        [f"g{i}" for i in range(generalists)]
        + [f"s{i}" for i in range(specialists)]
        + ["rest"] * rest
    )
