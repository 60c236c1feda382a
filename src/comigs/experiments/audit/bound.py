"""The largest epsilon that guesses of who was in a text refute: a lower bound, from one run.

Steinke, Nasr and Jagielski 2023 (2305.08846): each of m canaries was in by a coin flip of its own.
Whoever guesses r of the flips from what an (epsilon, delta)-private algorithm gave, and abstains
from the rest, is right in v of them with at most the probability that `p_value` returns.
"""

from __future__ import annotations

import math

HIGHEST = 30.0  # an epsilon that nothing here can refute


def binomial(n: int, q: float) -> list[float]:
    """Return the probabilities of 0 to n successes in n trials of probability q in (0, 1)."""
    found = []
    for k in range(n + 1):
        ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        found.append(math.exp(ways + k * math.log(q) + (n - k) * math.log1p(-q)))
    return found


def p_value(correct: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """Return the highest probability of at least so many correct guesses under (epsilon, delta).

    Theorem 5.2 of the paper: with W ~ Binomial(r, e^eps / (1 + e^eps)), it is P[W >= v] plus
    2 m delta times the maximum over i of P[v > W >= v - i] / i, which is 1 at most.
    """
    chances = binomial(guesses, 1 / (1 + math.exp(-epsilon)))
    pure = math.fsum(chances[correct:])
    steepest = below = 0.0
    for i in range(1, correct + 1):
        below += chances[correct - i]
        steepest = max(steepest, below / i)
    return min(1.0, pure + 2 * canaries * delta * steepest)


def epsilon_at_least(
    correct: int, guesses: int, canaries: int, delta: float, level: float = 0.05
) -> float:
    """Return the largest epsilon that the guesses refute with a probability of error `level`.

    0 where they refute none.
    """
    low, high = 0.0, HIGHEST
    if p_value(correct, guesses, canaries, low, delta) >= level:
        return 0.0
    # The p-value rises with epsilon, so it crosses the level once.
    for _ in range(40):
        middle = (low + high) / 2
        if p_value(correct, guesses, canaries, middle, delta) < level:
            low = middle
        else:
            high = middle
    return low
