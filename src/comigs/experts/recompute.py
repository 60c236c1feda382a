"""A block that is computed again for its gradient, instead of being kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from comigs.experts.mixture import Mixture
from comigs.experts.router import POSITIONS, reading_examples


def recomputed(forward: Callable[..., Any], mixture: Mixture, *args: Any, **kwargs: Any) -> Any:
    """Return what a block's forward pass makes, keeping what goes in alone.

    The backward pass computes it again. mixture: the block's own.
    """
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    positions = POSITIONS.get()

    @contextmanager
    def again() -> Iterator[None]:
        # A decision holds all of the block that it was made of, so the first one stays: what that
        # holds is let go on the way back.
        decided = mixture.routing
        try:
            with reading_examples(positions):
                yield
        finally:
            mixture.routing = decided

    # Nothing here is random, so that no generator has to be put back.
    return checkpoint(
        forward,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), again()),
        **kwargs,
    )
