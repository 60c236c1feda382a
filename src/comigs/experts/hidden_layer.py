"""This module holds the hidden layer of all experts, as hidden_torch.py and hidden_c.py compute it.

T tokens, I MLP width, E experts, S frozen products: up's, or gate's and up's. R is the LoRA ranks
of all experts together: an expert's ranks are next to each other, and experts follow each other.
For each product s and each expert, z_s = frozen_s + low_s @ B_s with the expert's part of R.
The hidden layer of an expert is h = act(z) of the only product, or act(gate's z) * (up's z) of two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from torch import Tensor

from comigs.experts.activation import Activation


class HiddenSettings(NamedTuple):
    """The settings say of a hidden layer what its tensors do not.

    `ranks` holds each expert's rank, and `learns` whether any of an expert's tensors wants a
    gradient. `top_k` of a token's weights are not zero, and with a gate perhaps one more; the
    others get no gradient.
    """

    act: Activation
    ranks: Sequence[int]
    learns: Sequence[bool]
    top_k: int


class HiddenLayer(NamedTuple):
    """A hidden layer holds what its result is computed from.

    All tensors but `frozen`, which are S of (T, I), have one dtype, in which the work is done.
    `A_RI` is that of `down`.
    """

    settings: HiddenSettings
    weights_TE: Tensor
    low_TSR: Tensor
    B_SRI: Tensor
    A_RI: Tensor
    frozen: Sequence[Tensor]

    @property
    def used(self) -> float:
        """The part of the experts that a token uses.

        Where it is below 1, an expert works only on the tokens that weigh it above 0. On other
        devices than a CPU, to ask which these are would make the processor wait for the device.
        """
        if self.weights_TE.device.type != "cpu":
            return 1.0
        return min(1.0, self.settings.top_k / len(self.settings.ranks))

    def ranks(self) -> Iterator[slice]:
        """Return where each expert's ranks are among all."""
        ends = accumulate(self.settings.ranks, initial=0)
        return (slice(start, end) for start, end in pairwise(ends))


class Wanted(NamedTuple):
    """This record says which tensors want a gradient; the frozen products always do."""

    weights_TE: bool
    low_TSR: bool
    B_SRI: bool
    A_RI: bool


class Gradients(NamedTuple):
    """The gradients to a hidden layer's tensors. None stands for a gradient that nobody wants."""

    weights_TE: Tensor | None
    low_TSR: Tensor | None
    B_SRI: Tensor | None
    A_RI: Tensor | None
    frozen: Sequence[Tensor]
