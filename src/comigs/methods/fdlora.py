"""FDLoRA: a shared LoRA and a personal one, whose sum adapts the base. 2406.07925.

At the end each client weighs the two anew, w1 * personal + w2 * shared, by what is best on its
valid, found without gradients (their adaptive fusion): a compass search in [-1, 1]^2 from (1, 1),
about ten evaluations, L1 term 0.05. Attention LoRA is one for all, as in every method here, and is
not weighed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pydantic import Field

from comigs.config import Config, Section
from comigs.methods import comigs
from comigs.methods.loading import options
from comigs.methods.method import Finished, Method, Nats, Tensors
from comigs.methods.shapes import require_generalists

Point = tuple[float, float]  # the weights of the personal and of the shared LoRA


class Options(Section):
    """The [options] of fdlora."""

    evaluations: int = Field(
        10, ge=1, description="A client reads its valid this many times to find its two weights."
    )
    l1: float = Field(
        0.05, ge=0, description="|w1| + |w2| has this weight beside the nats per token."
    )


def method(config: Config) -> Method:
    """Return the method whose generalists are the shared LoRA and specialists the personal one.

    Raises UserError without generalists.
    """
    settings = options(config, Options)
    require_generalists(config)

    def finish(tensors: Tensors, nats: Nats) -> Finished:
        def cost(weights: Point) -> float:
            return nats(weighed(tensors, *weights)) + settings.l1 * sum(map(abs, weights))

        return weighed(tensors, *compass_search(cost, settings.evaluations)), None

    # The two are trained as comigs trains its experts, but summed instead of routed.
    return replace(
        comigs.as_published(config),
        name="fdlora",
        summary="a shared LoRA plus a personal one; "
        "at the end each client weighs the two on its valid",
        paper="2406.07925",
        mixing="sum",
        finish=finish,
        last_looks=settings.evaluations,
        leaks="its shared LoRA learns through the personal one, which has learnt from all text",
    )


def weighed(tensors: Tensors, personal: float, shared: float) -> Tensors:
    """Return the tensors with both LoRA scaled, through B."""
    factors, scaled = {"specialist": personal, "generalist": shared}, dict(tensors)
    for slot, tensor in tensors.items():
        if slot.matrix == "B" and slot.role in factors:
            scaled[slot] = tensor * factors[slot.role]
    return scaled


def compass_search(cost: Callable[[Point], float], evaluations: int) -> Point:
    """Return the best of `evaluations` points, or of fewer where steps get too small to matter.

    Steps are 1/2 along either axis inside [-1, 1]^2, halved where none helps.
    """
    best, step = (1.0, 1.0), 0.5
    lowest, seen = cost(best), {best}
    while len(seen) < evaluations and step > 1e-6:
        # The first point that is better is the next centre; the others around are not tried.
        improved = False
        for along, across in ((-1, 0), (0, -1), (1, 0), (0, 1)):
            point = (best[0] + along * step, best[1] + across * step)
            if point in seen or max(map(abs, point)) > 1 or len(seen) == evaluations:
                continue
            seen.add(point)
            if (value := cost(point)) < lowest:
                best, lowest, improved = point, value, True
                break
        if not improved:
            step /= 2
    return best
