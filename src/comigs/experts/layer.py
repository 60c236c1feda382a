"""What the two ways through the hidden layer of all experts work on: `chunks` in PyTorch, `in_c` in
C.

T tokens, I MLP width, E experts, S frozen products: up's, or gate's and up's. R the LoRA ranks of
all experts together:
an expert's are next to each other, experts follow each other. With its part of each,
z_s = frozen_s + low_s @ B_s: h = act(z) of the only product, or act(gate's z) * (up's z) of two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from torch import Tensor

from comigs.experts.activation import Activation


class Layer(NamedTuple):
    """All but `frozen`, S of (T, I), is of one dtype, in which the work is done.

    ranks: of each expert. learns: whether it has tensors that want a gradient. used: the part of
    the experts that a token uses; below 1, an expert works on the tokens that weigh it above 0
    only. A_RI: of `down`.
    """

    act: Activation
    ranks: Sequence[int]
    learns: Sequence[bool]
    used: float
    weights_TE: Tensor
    low_TSR: Tensor
    B_SRI: Tensor
    A_RI: Tensor
    frozen: Sequence[Tensor]

    def rows(self) -> Iterator[slice]:
        """Where each expert's ranks are among all."""
        return (slice(*ends) for ends in pairwise(accumulate(self.ranks, initial=0)))


class Gradients(NamedTuple):
    """To the routing weights and the experts' tensors, where wanted, and to the frozen products."""

    weights_TE: Tensor | None
    low_TSR: Tensor | None
    B_SRI: Tensor | None
    A_RI: Tensor | None
    frozen: Sequence[Tensor]
