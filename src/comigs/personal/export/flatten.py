"""One LoRA that does nearly what a mixture does, its weights fitted on valid.

Each expert's LoRA is weighed with one number per block, site and expert, and their sum is a LoRA of
all their ranks. The numbers start as the mean routing weights of the block on valid; Adam then
takes `STEPS` steps on them alone, on windows of valid. Whichever of the two is better on valid is
kept. What is lost is that a token chose for itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from comigs.experts.mixture import Expert, Lora
from comigs.methods.lowrank import Pair, stack
from comigs.personal.export.lora_folder import Pairs
from comigs.personal.export.outputs import outputs
from comigs.personal.export.source import Source
from comigs.personal.export.weights import scaled

STEPS, RATE, AT_ONCE = 20, 0.02, 4  # Adam's steps, their length, and windows in each

Weights = dict[tuple[int, str], Tensor]  # (block, site) -> (E,)


def flat_weights(source: Source) -> tuple[Weights, str]:
    """Return the weight of each expert in the one LoRA, and a sentence on how good they are."""
    start = mean_weights(source)
    # A single expert has nothing to be weighed against.
    if source.mixing.is_single:
        return start, "One LoRA is all that this model has, so nothing is lost in it."
    # Twenty steps may also make it worse, so that both are measured in the same way.
    with flattened(source, pairs_of(source, start)):
        plain = outputs(source.base.model, source.windows)
    fitted = fit(source, start)
    with flattened(source, pairs_of(source, fitted)):
        better = outputs(source.base.model, source.windows)
    routed = outputs(source.base.model, source.windows)
    use_fitted = better.nats_per_token < plain.nats_per_token
    kept = "the fitted weights" if use_fitted else "mean weights"
    sentence = (
        f"Perplexity on valid: routed {routed.perplexity:.5g}, flat {better.perplexity:.5g} with "
        f"weights fitted there and {plain.perplexity:.5g} with mean weights; {kept} are in it."
    )
    return (fitted if use_fitted else start), sentence


def mean_weights(source: Source) -> Weights:
    """Return the mean routing weight of each expert on valid, per block and for all its sites."""
    mixtures = source.attachment.mixtures
    sites = list(source.base.architecture.mlp_linears())
    # Where no token changes the weights, they are known without reading anything.
    if source.mixing.weights_LE is not None:
        rows = list(source.mixing.weights_LE)
    else:
        totals: list[Tensor | float] = [0.0] * len(mixtures)
        tokens = 0
        with torch.no_grad():
            for x, _ in source.windows:
                source.base.model(torch.from_numpy(x), use_cache=False)
                tokens += x.size
                for layer, routing in enumerate(source.attachment.routings()):
                    totals[layer] = totals[layer] + routing.weights_TE.sum(dim=0)
        rows = [torch.as_tensor(total) / tokens for total in totals]
    return {(layer, site): row.clone() for layer, row in enumerate(rows) for site in sites}


def fit(source: Source, start: Weights) -> Weights:
    """Take Adam's steps on the weights alone, on windows of valid in turn."""
    # Nothing but these few hundred numbers learns: the experts stay what they are.
    weights = {at: row.clone().requires_grad_() for at, row in start.items()}
    optimizer = torch.optim.Adam(weights.values(), lr=RATE)
    windows = source.windows
    for step in range(STEPS):
        chosen = [windows[(step * AT_ONCE + i) % len(windows)] for i in range(AT_ONCE)]
        # The steps get shorter, so that the last ones settle between windows that disagree.
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        optimizer.zero_grad()
        with torch.enable_grad(), flattened(source, pairs_of(source, weights)):
            for inputs, targets in chosen:
                logits = source.base.model(torch.from_numpy(inputs), use_cache=False).logits[0]
                nats = F.cross_entropy(logits, torch.from_numpy(targets[0])) / len(chosen)
                nats.backward(retain_graph=True)  # the LoRA are shared
        optimizer.step()
    return {at: row.detach() for at, row in weights.items()}


def pairs_of(source: Source, weights: Weights) -> dict[tuple[int, str], Pair]:
    """Return the MLP's LoRA: all experts' ranks together, each with its weight."""
    found = {}
    for (layer, site), row in weights.items():
        experts = source.attachment.mixtures[layer].bound.experts
        pairs = [scaled(expert, site) for expert in experts]
        found[layer, site] = stack(pairs, list(row))
    return found


def attention_pairs(source: Source) -> dict[tuple[int, str], Pair]:
    """Return the attention's LoRA, which is one already."""
    found = {}
    for layer, adapted in enumerate(source.attachment.attention):
        for site, lora in adapted.items():
            if lora.A is not None and lora.B is not None:
                found[layer, site] = (lora.A, lora.scale * lora.B)
    return found


@contextmanager
def flattened(source: Source, pairs: Pairs) -> Iterator[None]:
    """Give the model one LoRA per linear and no router inside, and the client's own after.

    Attention that is not among them stays the client's.
    """
    put(source, [pairs], router=False)
    try:
        yield
    finally:
        source.attachment.bind(source.model.tensors)


def put(source: Source, experts: Sequence[Pairs], router: bool) -> None:
    """Point the mixtures at these experts, each with its scale in B, and at their attention."""
    sites = list(source.base.architecture.mlp_linears())
    for layer, mixture in enumerate(source.attachment.mixtures):
        own = replace(mixture.bound, experts=[_expert(pairs, layer, sites) for pairs in experts])
        if not router:
            own = replace(own, W_ED=None, gate=None)
        mixture.bind(own)
    for layer, adapted in enumerate(source.attachment.attention):
        for site, lora in adapted.items():
            if (layer, site) in experts[0]:
                (lora.A, lora.B), lora.scale = experts[0][layer, site], 1.0


def _expert(pairs: Mapping[tuple[int, str], Pair], layer: int, sites: Sequence[str]) -> Expert:
    """Return one block's part of an expert whose scale is in B."""
    A = {site: pairs[layer, site][0] for site in sites}
    B = {site: pairs[layer, site][1] for site in sites}
    return Expert([Lora(A, B, 1.0)])
