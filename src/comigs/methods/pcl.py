"""PCL: each client gets a mean of all models weighted by how well they do on its own valid.
2404.09753, strategy 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from comigs.config import Config, Section
from comigs.methods import fedavg
from comigs.methods.method import Download, Memory, Method, RoundContext, Upload, options
from comigs.slots import Slot


class Options(Section):
    """[options] of pcl."""

    probe_windows: int = Field(
        16, ge=1, description="windows of valid on which a client measures every model, a round"
    )


def method(config: Config) -> Method:
    """fedavg's experts, merged anew for every client."""
    return replace(
        fedavg.method(config),
        name="pcl",
        summary="every client measures all models on its valid and gets their weighted mean",
        paper="2404.09753",
        weights="softmax of -perplexity on the client's own valid",
        aggregate=aggregate,
        averages=False,
        probe=options(config, Options).probe_windows,
        reads_peers=True,
    )


def aggregate(
    uploads: Mapping[str, Upload], memory: Memory, context: RoundContext
) -> tuple[dict[str, Download], Memory]:
    """Client i gets sum_j softmax_j(-perplexity of model j on valid_i) theta_j."""
    downloads: dict[str, Download] = {}
    for reader, nats in context.peer_nats.items() if uploads else ():
        perplexity = {
            a: math.exp(nats[a] if nats[a] < 700 else 700) for a in uploads
        }  # of what a float holds
        authors = sorted(uploads, key=lambda name: (perplexity[name], _fingerprint(uploads[name])))
        weights = torch.softmax(
            torch.tensor([-perplexity[a] for a in authors], dtype=torch.float64), 0
        )
        downloads[reader] = {
            slot: _mean(slot, [uploads[a] for a in authors], weights)
            for slot in uploads[authors[0]]
        }
    return downloads, memory


def _mean(slot: Slot, uploads: list[Upload], weights: Tensor) -> Tensor:
    stacked = torch.stack([u[slot].to(torch.float64) for u in uploads])
    return torch.einsum("k,k...->...", weights, stacked).to(uploads[0][slot])


def _fingerprint(upload: Upload) -> float:
    """Orders models that are equally good, so that the sum does not depend on the order of
    clients.
    """
    return sum(float(tensor.to(torch.float64).sum()) for tensor in upload.values())
