"""The Architecture record: where experts go in a family of `transformers` models, and nothing
else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Architecture:
    """Names of parts of a decoder-only model whose MLP is `down(act(up(x)))` or `down(act(gate(x))
    * up(x))`.

    model_types: `config.model_type` values this record fits.
    blocks: path from the model to its list of transformer blocks.
    mlp: name of a block's MLP.
    up, gate, down, activation: names inside the MLP; gate is None where there is none.
    attention: site name -> path from a block to an attention linear.
    lr: default learning rate of the experts for this family.
    """

    model_types: tuple[str, ...]
    blocks: str
    mlp: str
    up: str
    gate: str | None
    down: str
    activation: str
    attention: Mapping[str, str]
    lr: float

    def mlp_linears(self) -> dict[str, str]:
        """Site name -> name inside the MLP."""
        gate = {"gate": self.gate} if self.gate else {}
        return {**gate, "up": self.up, "down": self.down}


def linear_size(linear: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear: nn.Linear, or transformers' Conv1D, whose weight is stored (in,
    out).
    """
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    return int(linear.nx), int(linear.nf)  # type: ignore[arg-type]
