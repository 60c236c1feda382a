"""One seed gives any number of independent, named random generators.

A generator is made anew from (seed, names) wherever it is needed, so there is no generator state to
save, and adding a client or an evaluation never changes what another client draws.
"""

from __future__ import annotations

import hashlib

import numpy as np


def generator(seed: int, *names: str | int) -> np.random.Generator:
    """Return the generator of this seed and these names, independent of that of any other names.

    For example `generator(42, "batch", "fr", "train", 17)`.
    """
    text = "\x1f".join([str(seed), *(f"{type(n).__name__}:{n}" for n in names)])
    return np.random.Generator(np.random.PCG64(list(hashlib.sha256(text.encode()).digest())))
