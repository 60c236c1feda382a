"""A router without an offset that does nearly what a gated one does, fitted on valid.

The gated router weighs the others' expert with open * sigmoid(-(d + log 9)), where d is the
difference of two logits of the token. No standard architecture has the offset log 9, nor the
factor `open`. Per block, a logistic regression of the own expert's weight on the router's input x
finds the w for which sigmoid(x w) comes nearest. Two logits x w and 0 then give that weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from comigs.personal.export.source import Source

TOKENS = 4096  # of valid at most: each block keeps that many inputs of the router in memory
PULL = 1e-4  # towards the router's own difference, so that directions that valid lacks stay
STEPS = 60


def distilled_routers(source: Source) -> list[Tensor]:
    """Return every block's router (2, D): the own expert's row, and zeros for the rest."""
    inputs: dict[int, list[Tensor]] = {}
    wanted: dict[int, list[Tensor]] = {}
    hooks = []
    # Each block's inputs and weights are kept as they pass.
    for layer, mixture in enumerate(source.attachment.mixtures):

        def keep(module: Any, args: tuple[Tensor, ...], output: Tensor, layer: int = layer) -> None:
            inputs.setdefault(layer, []).append(args[0].reshape(-1, args[0].shape[-1]).clone())
            wanted.setdefault(layer, []).append(module.routing.weights_TE[:, 0].clone())

        hooks.append(mixture.register_forward_hook(keep))
    # One pass over valid gives every block what its router reads and what it answers.
    tokens = 0
    with torch.no_grad():
        for x, _ in source.windows:
            source.base.model(torch.from_numpy(x), use_cache=False)
            tokens += x.size
            if tokens >= TOKENS:
                break
    for hook in hooks:
        hook.remove()
    # Two logits x w and 0 give the own expert the weight sigmoid(x w).
    routers = []
    for layer, mixture in enumerate(source.attachment.mixtures):
        router = mixture.bound.W_ED
        assert router is not None
        start_D = (router[0] - router[1]).double()
        x_TD, own_T = torch.cat(inputs.pop(layer)).double(), torch.cat(wanted.pop(layer)).double()
        w_D = logistic_fit(x_TD, own_T, start_D).float()
        routers.append(torch.stack([w_D, torch.zeros_like(w_D)]))
    return routers


def logistic_fit(x_TD: Tensor, weight_T: Tensor, start_D: Tensor) -> Tensor:
    """Return the w (D,) that makes sigmoid(x w) most like `weight_T`, from `start_D`."""
    w_D = start_D.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([w_D], max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(x_TD @ w_D, weight_T)
        loss = loss + PULL * (w_D - start_D).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return w_D.detach()
