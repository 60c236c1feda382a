"""What the two ways through the hidden layer of all experts work on: `chunks` in PyTorch, `in_c` in C.

T tokens, I MLP width, E experts, R LoRA rank (may differ between experts), S frozen products: up's, or gate's and up's.
With z_e = frozen + low_e @ B_e^T: h_e = act(z_e) of the only product, or act(gate's z_e) * (up's z_e) of two.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from comigs.experts.activation import Activation


class ExpertLora(NamedTuple):
    """One expert's part: for each frozen product (low^T (R, T), scaled B^T (R, I)), and A (R, I) of `down`."""

    inputs: Sequence[tuple[Tensor, Tensor]]
    A_RI: Tensor


class Layer(NamedTuple):
    """All but `frozen` is of one dtype, in which the work is done.

    used: the part of the experts that a token uses; below 1, an expert works on the tokens that weigh it above 0 only.
    """

    act: Activation
    used: float
    frozen: Sequence[Tensor]
    weights_TE: Tensor
    experts: Sequence[ExpertLora]


class Gradients(NamedTuple):
    """To the routing weights and the experts' tensors, where wanted, and to the frozen products."""

    weights_TE: Tensor | None
    frozen: Sequence[Tensor]
    flat: Sequence[Tensor | None]


def flat_of(experts: Iterable[ExpertLora]) -> list[Tensor]:
    """All tensors of all experts: low^T and B^T of each frozen product, then A."""
    return [t for lora in experts for t in (*(t for pair in lora.inputs for t in pair), lora.A_RI)]


def by_expert(flat: Sequence[Any], num_frozen: int) -> list[ExpertLora]:
    """The same the other way."""
    size = 2 * num_frozen + 1
    parts = [flat[i : i + size] for i in range(0, len(flat), size)]
    return [ExpertLora(list(zip(p[:-1:2], p[1::2], strict=True)), p[-1]) for p in parts]
