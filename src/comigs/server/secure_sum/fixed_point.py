"""This module turns numbers into whole ones that can be summed modulo 2^32, and sums back."""

from __future__ import annotations

import numpy as np


def step_of(bound: float, members: int) -> float:
    """Return the size of a step: the smallest in which a sum of that many numbers has room.

    bound: no number is larger. A number is at most 2^(31 - b) steps, b being the binary digits of
    `members`, so that a sum of as many is below 2^31 and its sign is known.
    """
    return bound * float(2.0 ** (members.bit_length() - 31))


def to_steps(values: np.ndarray, bound: float, members: int) -> np.ndarray:
    """Return numbers as whole steps, halves to even: (N,) float64 to (N,) uint32, modulo 2^32.

    What is beyond the bound is cut off there.
    """
    step = step_of(bound, members)
    whole: np.ndarray = np.rint(np.clip(values, -bound, bound) / step).astype(np.int64)
    return whole.astype(np.uint32)


def from_steps(total: np.ndarray, bound: float, members: int) -> np.ndarray:
    """Return the sum of numbers from the sum of their steps: (N,) uint32 to (N,) float64."""
    values: np.ndarray = total.view(np.int32).astype(np.float64) * step_of(bound, members)
    return values
