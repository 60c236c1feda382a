"""How much of its output a token gets from what clients share, in each block of a client's model.

T tokens, L blocks, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from comigs.client.evaluate import evaluation_mode
from comigs.client.loss import autocast
from comigs.data.batches import stream_windows
from comigs.errors import UserError
from comigs.methods.loading import load_method
from comigs.personal.model import PersonalModel, client_shape
from comigs.runs.folder import RunFolder


def shared_experts(folder: RunFolder, client: str) -> list[int]:
    """Return which of a client's experts are what clients share, by their rows in the router.

    Those are the generalists; where everybody's generalist is beside a client's own experts, it is
    that one, as in the report. Raises UserError where the client's model is one part alone, or has
    no router, or one that cannot choose between both.
    """
    shape = client_shape(folder, client)
    where = f'{folder.path}: client "{client}"'
    if load_method(folder.config()).mixing != "routed" or shape.num_experts < 2:
        experts = "one expert" if shape.num_experts < 2 else "experts that all weigh the same"
        raise UserError(f"{where} has no router, as it has {experts}; so no token is routed")
    if shape.others == "none" and 0 in (shape.generalists, shape.specialists):
        only = "generalists" if shape.generalists else "specialists"
        raise UserError(f"{where} has {only} only; so no token chooses between both kinds")

    # A router is left where one part was kept, but chooses between equals.
    own = folder.summary().clients.get(client) if folder.checkpoint().finished else None
    if own is not None and own.kept_part is not None:
        raise UserError(f"{where}: its model is one part: {own.kept_part}; no token is routed")
    return list(range(shape.generalists)) if shape.others == "none" else [shape.num_experts - 1]


def is_beside_others(folder: RunFolder, client: str) -> bool:
    """Return whether everybody's generalist is beside a client's own experts."""
    return client_shape(folder, client).others != "none"


def generalist_weight(weights_TE: Tensor, shared: Sequence[int]) -> Tensor:
    """Return the weight of all shared experts together (...), of routing weights (..., E)."""
    return weights_TE[..., list(shared)].sum(dim=-1)


def read_weights(
    model: PersonalModel, streams: Sequence[NDArray[Any]], shared: Sequence[int]
) -> NDArray[np.float32]:
    """Return the generalist weights (T, L) of every token that is read of these streams.

    They are read in the run's own windows, as in its evaluation. The last token of a stream is only
    predicted, and a route is chosen where a token is read.
    """
    length, batch = model.config.data.sequence_length, model.config.evaluation.batch_size
    body, found = model.model.base_model, []
    with torch.no_grad(), evaluation_mode(model.model):
        for stream in streams:
            for inputs, _, _ in stream_windows(stream, length, batch):
                x = torch.from_numpy(inputs).to(model.model.device)
                with autocast(model.dtype, x.device):
                    body(input_ids=x, use_cache=False)
                routed = [routing.weights_TE for routing in model.attachment.routings()]
                weights = generalist_weight(torch.stack(routed, dim=1), shared)
                found.append(weights.float().cpu().numpy())
    # Sums of weights can end above 1 by their rounding alone.
    return np.concatenate(found).clip(0, 1)
