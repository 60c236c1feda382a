"""What is drawn so that nobody can take it away again: noise, and which documents are in a step.

It comes from the operating system, not from the run's seed. Who knows a seed can subtract the
noise; and sampling makes epsilon smaller only where nobody knows who was sampled. A fresh 128-bit
key from the operating system begins a Philox generator for every step, which is a counter through a
keyed mixing function, and not a cipher.
"""

from __future__ import annotations

import secrets

import numpy as np
from numpy.typing import NDArray

from comigs.seeds import generator

KEY_BITS = 128
DRAWS = 4  # normal numbers in one number of noise


def step_generator(seed: int | None, purpose: str, step: int) -> np.random.Generator:
    """Return the generator of one step for a purpose, such as a client's noise; with a seed, for
    tests, the same each time.
    """
    if seed is not None:
        return generator(seed, "privacy", purpose, step)
    return np.random.Generator(np.random.Philox(key=secrets.randbits(KEY_BITS)))


def poisson_sample(
    random: np.random.Generator, number: int, sampling_rate: float
) -> NDArray[np.int64]:
    """Return which of so many are in a step, documents or clients: each is by itself, with the same
    probability.
    """
    return np.flatnonzero(random.random(number) < sampling_rate)


def gaussian(
    random: np.random.Generator, shape: tuple[int, ...], deviation: float
) -> NDArray[np.float64]:
    """Return Gaussian noise of this standard deviation.

    A single float's last bits can tell noise with a signal from noise without (Mironov 2012). So
    each number is the sum of four draws, halved (2107.10138, section 5.1, as Opacus' secure mode).
    """
    total = np.zeros(shape)
    for _ in range(DRAWS):
        total += random.standard_normal(shape)
    noise: NDArray[np.float64] = total * (deviation / DRAWS**0.5)
    return noise
