"""FDLoRA: a shared LoRA and a personal one, whose sum adapts the base; fused per client at the end.
2406.07925.

At the end each client weighs the two anew, w1 * personal + w2 * shared, by what is best on its
valid, found without gradients (their adaptive fusion): a compass search in [-1, 1]^2 from (1, 1),
about ten evaluations, L1 term 0.05.
Attention LoRA is one for all, as in every method here, and is not weighed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pydantic import Field

from comigs.config import Config, Section
from comigs.methods import comigs
from comigs.methods.method import Method, Tensors, options


class Options(Section):
    """[options] of fdlora."""

    evaluations: int = Field(
        10, ge=1, description="times that a client reads its valid to find its two weights"
    )
    l1: float = Field(0.05, ge=0, description="weight of |w1| + |w2| beside the nats per token")


def method(config: Config) -> Method:
    """Generalists are the shared LoRA, specialists the personal one."""
    settings = options(config, Options)

    def finish(tensors: Tensors, nats: Callable[[Tensors], float]) -> Tensors:
        def cost(weights: tuple[float, float]) -> float:
            return nats(weighed(tensors, *weights)) + settings.l1 * sum(map(abs, weights))

        return weighed(tensors, *compass_search(cost, settings.evaluations))

    return replace(
        comigs.as_published(config),
        name="fdlora",
        summary="a shared LoRA plus a personal one; at the end each client weighs the two on its valid",
        paper="2406.07925",
        mixing="sum",
        finish=finish,
    )


def weighed(tensors: Tensors, personal: float, shared: float) -> Tensors:
    """The tensors with both LoRA scaled, through B."""
    factors = {"specialist": personal, "generalist": shared}
    return {
        s: t * factors[s.role] if s.matrix == "B" and s.role in factors else t
        for s, t in tensors.items()
    }


def compass_search(
    cost: Callable[[tuple[float, float]], float], evaluations: int
) -> tuple[float, float]:
    """The best of `evaluations` points: steps of 1/2 along either axis inside [-1, 1]^2, halved
    where none helps.

    Fewer points where steps get too small to matter.
    """
    best, step = (1.0, 1.0), 0.5
    lowest, seen = cost(best), {best}
    while len(seen) < evaluations and step > 1e-6:
        around = [
            (best[0] + a * step, best[1] + b * step) for a, b in ((-1, 0), (0, -1), (1, 0), (0, 1))
        ]
        new = [p for p in around if p not in seen and max(map(abs, p)) <= 1]
        better = False
        for point in new[: evaluations - len(seen)]:
            seen.add(point)
            if (value := cost(point)) < lowest:
                best, lowest, better = point, value, True
                break
        step = step if better else step / 2
    return best
