"""A round's mean that is private by client: steps are cut, and the server adds noise. 1710.06963.

What everybody gets, and whoever gets it from them, says little of any one client's part in the run,
whatever that client's text is. The server sees each upload, and its own files hold all that clients
report: it is trusted, and its files are not what is private.

Which clients are in a round is drawn from the operating system, each by itself. The sum of their
steps is divided by the number that is expected, so that nothing depends on who came.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from comigs.config import Config
from comigs.methods.method import Download, Tensors
from comigs.privacy.budget import Plan, noise_for
from comigs.privacy.noise import gaussian, poisson_sample, step_generator
from comigs.server.validation import Start, origin_of
from comigs.slots import Shapes, Slot


def plan_of_clients(config: Config) -> Plan:
    """Return the plan of a config that is private by client."""
    clients = len(config.clients)
    rate = config.asked / clients
    noise = noise_for(config, rate, config.rounds)
    return Plan(clients, rate, noise, 1, config.privacy.delta)


def sampled_clients(config: Config, round: int) -> list[str]:
    """Return the clients of a round, in the config's order; there may be none."""
    plan = plan_of_clients(config)
    random = step_generator(config.privacy.noise_seed, "sampled clients", round)
    names = config.names
    return [names[number] for number in poisson_sample(random, len(names), plan.sampling_rate)]


def spent(config: Config, rounds: int) -> float | None:
    """Return the epsilon of so many rounds; None where nothing is private."""
    if not config.privacy.by_client or config.privacy.noise_seed is not None:
        return None
    found = plan_of_clients(config).epsilon(rounds)
    return found if math.isfinite(found) else None


class PrivateMean:
    """The mean of one round's uploads with noise.

    expected: slots and shapes of an upload. download: what all clients started from; start: where
    they did before any training.
    """

    def __init__(
        self, config: Config, round: int, expected: Shapes, download: Download, start: Start
    ) -> None:
        self._plan, self._clip = plan_of_clients(config), config.privacy.clip
        self._random = step_generator(config.privacy.noise_seed, "mean of clients", round)
        self._origin = origin_of(download, expected, start)

    def __call__(self, uploads: Iterable[Tensors]) -> dict[Slot, Tensor]:
        """Return the mean, also of no upload at all: then it is noise."""
        sums = {s: torch.zeros_like(t, dtype=torch.float64) for s, t in self._origin.items()}
        for upload in uploads:
            for slot, step in self._cut(upload).items():
                sums[slot] += step
        deviation = self._plan.noise_multiplier * self._clip
        expected = self._plan.sampling_rate * self._plan.population
        mean = {}
        for slot, origin in self._origin.items():
            noise = torch.from_numpy(gaussian(self._random, tuple(origin.shape), deviation))
            mean[slot] = (origin.double() + (sums[slot] + noise) / expected).to(origin.dtype)
        return mean

    def _cut(self, upload: Mapping[Slot, Tensor]) -> dict[Slot, Tensor]:
        """Return a client's step, no longer than the clip over all tensors together."""
        steps = {s: upload[s].double() - origin.double() for s, origin in self._origin.items()}
        norm = math.sqrt(sum(float(step.square().sum()) for step in steps.values()))
        factor = min(1.0, self._clip / norm) if norm else 1.0
        return {slot: factor * step for slot, step in steps.items()}
