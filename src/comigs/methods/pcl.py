"""PCL: each client gets a mean of all models, weighted by its own valid. 2404.09753, strategy 2."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from pydantic import Field

from comigs.config import Config, Section
from comigs.methods import fedavg
from comigs.methods.loading import options
from comigs.methods.method import Download, Memory, Method, RoundContext, Upload
from comigs.perplexity import perplexity_of


class Options(Section):
    """The [options] of pcl."""

    probe_windows: int = Field(
        16, ge=1, description="A client measures every model on this many windows of valid a round."
    )


def method(config: Config) -> Method:
    """Return fedavg's experts, merged anew for every client."""
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
        leaks="each client tells the server how well every upload does on its valid text",
    )


def aggregate(
    uploads: Mapping[str, Upload], memory: Memory, context: RoundContext
) -> tuple[dict[str, Download], Memory]:
    """Send client i sum_j softmax_j(-perplexity of model j on valid_i) theta_j."""
    downloads: dict[str, Download] = {}
    for reader, nats in context.peer_nats.items() if uploads else ():
        # A float holds no perplexity of more nats, and what is no number (of which `min` returns
        # the other) counts as the worst. Models that are equally good are ordered by their
        # numbers, so that the sum does not depend on the order of clients.
        perplexity = {a: perplexity_of(min(math.inf, nats[a])) for a in uploads}
        authors = sorted(uploads, key=lambda name: (perplexity[name], _fingerprint(uploads[name])))
        worth = torch.tensor([-perplexity[author] for author in authors], dtype=torch.float64)
        weights_K = torch.softmax(worth, 0)
        download = {}
        for slot, like in uploads[authors[0]].items():
            stacked = torch.stack([uploads[author][slot].to(torch.float64) for author in authors])
            download[slot] = torch.einsum("k,k...->...", weights_K, stacked).to(like)
        downloads[reader] = download
    return downloads, memory


def _fingerprint(upload: Upload) -> float:
    return sum(float(tensor.to(torch.float64).sum()) for tensor in upload.values())
