"""The fault of the authors' loop, which their recorded trajectory has and ours must not have."""

from __future__ import annotations

import contextlib


@contextlib.contextmanager
def leaky_gradients_for(state, levels, trains):
    """Stand in for `comigs.client.steps.gradients_for`: all tensors collect gradients, and only the
    stepped levels' are dropped, so that the others' leak into their next step.
    """
    stepped = {id(tensor) for level in levels for tensor in state.of(level)}
    for slot, tensor in state.tensors.items():
        tensor.requires_grad_(slot.role != "merged" and trains(slot))
    try:
        yield
    finally:
        for tensor in state.tensors.values():
            tensor.requires_grad_(False)
            if id(tensor) in stepped:
                tensor.grad = None
