"""The personal model that an export is made of, and how its experts are weighed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from comigs.bases.load import Base
from comigs.client.state import shape_as_saved
from comigs.data.batches import single_examples
from comigs.data.corpus import TokenStore
from comigs.errors import UserError
from comigs.experts.attach import Attachment
from comigs.experts.mixture import Mixture
from comigs.methods.loading import load_method
from comigs.methods.method import Method
from comigs.personal.model import PersonalModel
from comigs.runs.folder import RunFolder
from comigs.slots import OTHERS

Window = tuple[NDArray[np.int64], NDArray[np.int64]]  # inputs and targets, both (1, length)
WINDOWS = 32  # of valid, on which an export is fitted, measured and checked


@dataclass(frozen=True)
class Source:
    """A source is a client's own model in float32 on the CPU, and windows of its valid.

    base is the base that carries the experts. windows hold inputs and targets, (1, length) each.
    """

    folder: RunFolder
    client: str
    base: Base
    model: PersonalModel
    windows: Sequence[Window]

    @property
    def attachment(self) -> Attachment:
        """Return the experts on the base, bound to the client's tensors."""
        return self.model.attachment

    @cached_property
    def method(self) -> Method:
        """Return the method that the run was made with."""
        return load_method(self.model.config)

    @cached_property
    def mixing(self) -> Mixing:
        """Return how the experts of this model are weighed."""
        return mixing_of(self.attachment.mixtures)

    @property
    def experts(self) -> list[tuple[str, ...]]:
        """Return the experts in the router's order, by the parts that each is the sum of."""
        config, method = self.model.config, self.method
        shape = method.shape(config.shape_of(config.client_named(self.client)))
        shape = shape_as_saved(shape, map(str, self.model.tensors))
        return self.attachment.experts_of(shape.parts)

    @property
    def private_parts(self) -> list[str]:
        """Return the parts that never left the client: experts, router or attention.

        Where only sums leave it, or what has learnt by noised steps, its own generalists do not,
        unless they are what everybody gets: a download that is taken whole.
        """
        privacy, method = self.model.config.privacy, self.method
        others_see_less = privacy.by_document or privacy.secure_aggregation
        kept = set()
        for slot in self.model.tensors:
            is_own = method.mix is not None or not method.receives(slot)
            if not method.shares(slot) or (others_see_less and is_own):
                kept.add(slot.part)
        return sorted(kept - {OTHERS, "merged"})


@dataclass(frozen=True)
class Mixing:
    """This record says what decides the weights of E experts, K of which a token uses.

    routing is "token", "sequence" or "constant". weights_LE holds the constant weights of each
    block. gated says that the router is only so far open to the others' expert, and starts
    with an offset, which no standard architecture has.
    """

    num_experts: int
    top_k: int
    routing: str
    weights_LE: Tensor | None = None
    gated: bool = False

    @property
    def is_dense(self) -> bool:
        """Return whether every token has the same weights, so that one wider MLP is the same."""
        return self.routing == "constant"

    @property
    def is_uniform(self) -> bool:
        """Return whether all experts weigh the same, as without a router."""
        weights_LE = self.weights_LE
        return weights_LE is not None and bool((weights_LE == 1 / self.num_experts).all())

    @property
    def is_single(self) -> bool:
        """Return whether there is one expert, whose weight is 1."""
        return self.weights_LE is not None and self.weights_LE.shape[1] == 1


def mixing_of(mixtures: Sequence[Mixture]) -> Mixing:
    """Read from bound mixtures how they weigh their experts."""
    first = mixtures[0].bound
    num_experts = len(first.experts)
    if first.W_ED is not None and first.routed_by != "client":
        return Mixing(num_experts, first.top_k, first.routed_by, gated=first.gate is not None)
    # Without a router, or with one that reads a constant, the mixture itself says its weights.
    width = first.loras[0].A["up"].shape[1]
    nothing = torch.zeros(1, 1, width)
    rows = [mixture.routing_weights(nothing).reshape(-1, num_experts)[0] for mixture in mixtures]
    top_k = first.top_k if first.W_ED is not None else num_experts
    return Mixing(num_experts, top_k, "constant", torch.stack(rows))


def windows_of(stores: Sequence[TokenStore], length: int) -> list[Window]:
    """Return up to `WINDOWS` whole windows of these stores, (1, length) each, from their start.

    A chat is a window. Raises UserError where there is no text.
    """
    batches = islice(single_examples(stores, length), WINDOWS)
    found = [(batch.inputs, batch.targets) for batch in batches]
    if not found:
        raise UserError("valid: has no text, and an export is checked on it")
    return found
