"""Low-rank updates: the only place that knows what `B @ A` means.

Shapes: A (R, in), B (out, R), delta = scaling * B @ A (out, in).
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

Scaling = Literal["rslora", "lora"]


def scaling(alpha: float, rank: int, kind: Scaling = "rslora") -> float:
    """The factor before B @ A: alpha / sqrt(rank) ("rslora", 2312.03732) or alpha / rank ("lora", 2106.09685)."""
    return alpha / math.sqrt(rank) if kind == "rslora" else alpha / rank


def delta(A_RI: Tensor, B_OR: Tensor, scale: float) -> Tensor:
    """The weight update (out, in) that the pair stands for."""
    return scale * (B_OR @ A_RI)
