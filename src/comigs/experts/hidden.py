"""This module computes the hidden layer of all experts, and recomputes it instead of storing it.

Plain autograd would keep about five (T, I) tensors per expert and block for the backward pass. This
keeps the frozen products only, which all experts share, and rebuilds each expert's hidden layer
from them when its turn comes: in C where it can be (hidden_c.py), else in PyTorch
(hidden_torch.py).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from comigs.experts import hidden_c, hidden_torch
from comigs.experts.hidden_layer import HiddenLayer, HiddenSettings, Wanted


def mixed_hidden(layer: HiddenLayer) -> tuple[Tensor, Tensor]:
    """Return the mixed hidden layer, sum_e w_e h_e (T, I), and the experts' inputs to B of `down`.

    These inputs, (w_e h_e) @ A_e^T of each expert, are beside each other: (T, R).
    """
    with torch.autocast(layer.weights_TE.device.type, enabled=False):
        mixed: tuple[Tensor, Tensor] = MixedHidden.apply(  # type: ignore[no-untyped-call]
            layer.settings,
            layer.weights_TE,
            layer.low_TSR,
            layer.B_SRI,
            layer.A_RI,
            *layer.frozen,
        )
    return mixed


class MixedHidden(torch.autograd.Function):
    """The autograd function behind `mixed_hidden`. It saves the tensors that the layer is given."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: HiddenSettings,
        weights_TE: Tensor,
        low_TSR: Tensor,
        B_SRI: Tensor,
        A_RI: Tensor,
        *frozen: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.settings = settings
        ctx.save_for_backward(weights_TE, low_TSR, B_SRI, A_RI, *frozen)
        layer = HiddenLayer(settings, weights_TE, low_TSR, B_SRI, A_RI, frozen)
        mixed: tuple[Tensor, Tensor] = _module_for(layer).forward(layer)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mixed_TI: Tensor, grad_low_TR: Tensor) -> tuple[Tensor | None, ...]:
        weights_TE, low_TSR, B_SRI, A_RI, *frozen = ctx.saved_tensors
        layer = HiddenLayer(ctx.settings, weights_TE, low_TSR, B_SRI, A_RI, frozen)
        _settings, weights, low, B, A, *_frozen = ctx.needs_input_grad
        wanted = Wanted(weights_TE=weights, low_TSR=low, B_SRI=B, A_RI=A)
        found = _module_for(layer).backward(layer, grad_mixed_TI, grad_low_TR, wanted)
        return (
            None,  # to the settings, which are no tensor
            found.weights_TE,
            found.low_TSR,
            found.B_SRI,
            found.A_RI,
            *found.frozen,
        )


def _module_for(layer: HiddenLayer) -> ModuleType:
    if hidden_c.takes(layer):
        return hidden_c
    return hidden_torch
