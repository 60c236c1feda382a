"""A client's tensors as a forward pass without gradients wants them: stacked once, scales
multiplied in.

D model width, I MLP width, E experts, R the LoRA ranks of all experts together, S inputs of the MLP
(up, or gate and up).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PackedExperts:
    """The experts and the router of one client in one block.

    ranks: of each expert. A_in_RD: of all inputs and experts, (S * R, D). B_SRI and B_RD have the
    scale of their LoRA in them. W_ED: the router, None: every expert weighs 1/E. gate, top_k,
    routed_by and merged are as in `BlockExperts`.
    """

    ranks: tuple[int, ...]
    A_in_RD: Tensor
    B_SRI: Tensor
    A_RI: Tensor
    B_RD: Tensor
    W_ED: Tensor | None
    gate: Tensor | None
    merged: Mapping[str, Tensor]
    top_k: int
    routed_by: str


@dataclass(frozen=True)
class PackedLora:
    """The LoRA of one client on one attention linear: A (R, in), B (R, out) with the scale in it;
    both may be None.
    """

    A: Tensor | None
    B: Tensor | None
    merged: Tensor | None
