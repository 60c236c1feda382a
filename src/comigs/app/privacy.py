"""This module says what a run's privacy comes to before it starts, and refuses what cannot be."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping

from comigs.config import Config
from comigs.data.prepare import Texts
from comigs.privacy.budget import Plan, batch_of, plan_for, require_documents
from comigs.server.private_mean import plan_of_clients
from comigs.text import listed

SEEDED = "NOT PRIVATE: privacy.noise_seed is given, and whoever knows it can take noise away"
# Of privacy.clip, on each number of a step's mean. At 0.12 fedavg, which has nothing but what is
# shared, was worse than training alone (results/README.md, "privacy").
LOUD = 0.1


def privacy_lines(config: Config, texts: Texts) -> Iterator[str]:
    """Yield lines on what is bounded, by how much, and which documents each client has.

    Raises UserError for a client that has too few, or too many for delta.
    """
    privacy, documents = config.privacy, dict[str, int]()
    if privacy.by_client:
        yield from _client_lines(config)
    if not privacy.by_document:
        return
    for name, outline in texts.outlines().items():
        documents[name] = sum(text.num_documents for text in outline.train)
        require_documents(config, name, documents[name])

    # Clients of one size have one plan, and all others lie between the smallest and the largest.
    by_size = sorted(documents, key=documents.__getitem__)
    plans = {name: plan_for(config, name, documents[name]) for name in (by_size[0], by_size[-1])}
    figures = " and ".join(_figures(config, plans))
    yield _bounded("document", plans[by_size[0]], config.rounds, figures)
    has = [f"{name} {number:,}" for name, number in documents.items()]
    yield f"documents in train, of which a step has {batch_of(config):g} on average: {listed(has)}"
    yield from _noise_lines(config, documents, by_size)
    if privacy.noise_seed is not None:
        yield SEEDED


def _client_lines(config: Config) -> Iterator[str]:
    plan = plan_of_clients(config)
    figures = (
        f"{_spent(config, plan)}; {plan.sampling_rate:.0%} of {plan.population:,} clients in a "
        "round on average; the server is trusted"
    )
    yield _bounded("client", plan, config.rounds, figures)
    if config.privacy.noise_seed is not None:
        yield SEEDED


def _bounded(unit: str, plan: Plan, rounds: int, figures: str) -> str:
    if math.isinf(plan.epsilon(rounds)):
        return f"NOT PRIVATE: noise {plan.noise_multiplier:g} times privacy.clip counts as none"
    return f"private by {unit}, with {figures}"


def _spent(config: Config, plan: Plan) -> str:
    noise = f"noise {plan.noise_multiplier:.3g} times privacy.clip"
    return f"epsilon {plan.epsilon(config.rounds):.3g}, delta {plan.delta:g}, {noise}"


def _figures(config: Config, plans: Mapping[str, Plan]) -> Iterator[str]:
    told = set()
    for name, plan in plans.items():
        if plan not in told:
            told.add(plan)
            yield f"{_spent(config, plan)} ({name}, {plan.population:,} documents)"


def _noise_lines(config: Config, documents: Mapping[str, int], by_size: list[str]) -> Iterator[str]:
    """Yield what noise is left on a step's mean, and whose is too loud to learn much beside it."""
    batch = batch_of(config)

    def part(name: str) -> float:
        return plan_for(config, name, documents[name]).noise_multiplier / batch

    smallest = by_size[0]
    most = part(smallest)
    yield f"noise on each number of a step's mean: {most:.2g} of privacy.clip for {smallest}"
    if most <= LOUD:
        return

    # Noise falls with the number of documents, so those with too much of it are the smallest. As
    # many times the documents and the batch leave epsilon and noise on the sum as they are.
    loud = by_size[: bisect_left(by_size, True, key=lambda name: part(name) <= LOUD)]
    times = most / LOUD
    yield (
        f"TOO MUCH NOISE to learn much of what is shared, above {LOUD:g} of privacy.clip: "
        f"{listed(loud)}; {smallest} would have {LOUD:g} with "
        f"about {math.ceil(documents[smallest] * times):,} documents and privacy.expected_batch = "
        f"{math.ceil(batch * times):,}"
    )
