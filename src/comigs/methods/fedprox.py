"""FedProx: fedavg, and the local loss pulls back to the download. 1812.06127, equation 2."""

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from comigs.config import Config, Section
from comigs.methods import fedavg
from comigs.methods.loading import options
from comigs.methods.method import Method, Tensors


class Options(Section):
    """The [options] of fedprox."""

    mu: float = Field(
        0.01, ge=0, description="The local loss has mu/2 * |theta - download|^2 added."
    )


def method(config: Config) -> Method:
    """Return fedavg with the proximal term."""
    mu = options(config, Options).mu

    def penalty(tensors: Tensors, anchor: Tensors) -> Tensor:
        apart = [(t - anchor[slot]).square().sum() for slot, t in tensors.items()]
        return mu / 2 * torch.stack(apart).sum()

    return replace(
        fedavg.method(config),
        name="fedprox",
        summary="fedavg with a pull towards the last download in the local loss",
        paper="1812.06127",
        penalty=penalty if mu else None,
    )
