"""This module says where experts go in a family of `transformers` models, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn


@dataclass(frozen=True)
class Architecture:
    """An architecture names the parts of a decoder-only model.

    The model's MLP is `down(act(up(x)))` or `down(act(gate(x)) * up(x))`.

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
        """Return by site the names inside the MLP."""
        gate = {"gate": self.gate} if self.gate else {}
        return {**gate, "up": self.up, "down": self.down}


class Loader(NamedTuple):
    """A loader returns a model and its tokenizer; its summary is a line of `comigs list`."""

    load: Callable[[], tuple[Any, Any]]
    summary: str


def linear_size(linear: nn.Module) -> tuple[int, int]:
    """Return (in, out) of an nn.Linear, or of transformers' Conv1D, whose weight is (in, out)."""
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    return int(linear.nx), int(linear.nf)  # type: ignore[arg-type]
