"""CoMiGS with one own expert, all of it averaged, beside the others' expert, frozen. Ours.

Each client has a single own expert of all its configured ranks (two of rank 8 are one of 16). The
server averages it, so that all of it is sent, and only the router stays home. A client adopts as
much of the averaged expert as its valid asks, and what it does not adopt stands beside its own:
the others' expert, frozen, as in FedALT (2503.11880). Why, and what it costs: docs/decisions/0013.
"""

from __future__ import annotations

from dataclasses import replace

from comigs.config import Config
from comigs.methods import comigs
from comigs.methods.loading import options
from comigs.methods.method import Method
from comigs.methods.shapes import beside_others


class Options(comigs.Adoption):
    """The [options] of comigs-others."""


def method(config: Config) -> Method:
    """Return comigs with one own expert of all ranks and, frozen beside it, the others'.

    The router learns with the experts from train, and by itself from valid.
    """
    shape = beside_others("gated")
    advice = "method comigs takes specialists that differ"
    return replace(
        comigs.as_published(config, shape, advice),
        name="comigs-others",
        summary="own experts averaged as far as valid asks, "
        "what is left of the others frozen beside them (bi-level)",
        shape=shape,
        schedule="both",
        mix=comigs.mix_beside_others,
        looks=comigs.LOOKS,
        probe=options(config, Options).probe_windows,
        leaks="its own expert is sent, and learns beside a router that has learnt from all text",
    )
