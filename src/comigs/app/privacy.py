"""This module says what a run's privacy comes to before it starts, and refuses what cannot be."""

from __future__ import annotations

import math
from collections.abc import Iterator

from comigs.config import Config
from comigs.data.prepare import Texts
from comigs.privacy.budget import Plan, batch_of, plan_for, require_documents
from comigs.server.private_mean import plan_of_clients
from comigs.text import listed

SEEDED = "NOT PRIVATE: privacy.noise_seed is given, and whoever knows it can take noise away"


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
    plans = [(name, plan_for(config, name, documents[name])) for name in (by_size[0], by_size[-1])]
    yield f"private by document, with {' and '.join(_figures(config, plans))}"
    needed = math.ceil(batch_of(config))
    has = [f"{name} {number:,}" for name, number in documents.items()]
    yield f"a client needs {needed:,} documents in train, and has: {listed(has)}"
    if privacy.noise_seed is not None:
        yield SEEDED


def _client_lines(config: Config) -> Iterator[str]:
    plan = plan_of_clients(config)
    spent = _spent(plan.epsilon(config.rounds))
    yield (
        f"private by client, with {spent}, delta {plan.delta:g}, noise "
        f"{plan.noise_multiplier:.3g} times privacy.clip; {plan.sampling_rate:.0%} of "
        f"{plan.population:,} clients in a round on average; the server is trusted"
    )
    if config.privacy.noise_seed is not None:
        yield SEEDED


def _spent(epsilon: float) -> str:
    return "NO NOISE" if math.isinf(epsilon) else f"epsilon {epsilon:.3g}"


def _figures(config: Config, plans: list[tuple[str, Plan]]) -> Iterator[str]:
    told = set()
    for name, plan in plans:
        if plan in told:
            continue
        told.add(plan)
        spent = _spent(plan.epsilon(config.rounds))
        noise = f"noise {plan.noise_multiplier:.3g} times privacy.clip"
        yield f"{spent}, delta {plan.delta:g}, {noise} ({name}, {plan.population:,} documents)"
