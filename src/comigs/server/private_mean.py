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
from dataclasses import dataclass

import torch
from torch import Tensor

from comigs.config import Config
from comigs.methods.method import Download, Tensors
from comigs.privacy.accountant import Steps, epsilon, noise_multiplier_for
from comigs.privacy.noise import gaussian, poisson_sample, step_generator
from comigs.server.validation import Start
from comigs.slots import Shapes, Slot


@dataclass(frozen=True)
class ClientPrivacy:
    """What a config's [privacy] comes to by client.

    sampling_rate: the probability of a client to be in a round.
    """

    clients: int
    sampling_rate: float
    noise_multiplier: float
    delta: float

    def epsilon(self, rounds: int) -> float:
        """Return what so many rounds spend."""
        return epsilon([Steps(self.sampling_rate, self.noise_multiplier, rounds)], self.delta)


def client_privacy(config: Config) -> ClientPrivacy:
    """Return what a config that is private by client comes to."""
    privacy, clients = config.privacy, len(config.clients)
    rate = (config.participation.clients_per_round or clients) / clients
    noise = privacy.noise_multiplier
    if noise is None:
        assert privacy.epsilon is not None, "the config has one of both"
        noise = noise_multiplier_for(privacy.epsilon, privacy.delta, rate, config.rounds)
    return ClientPrivacy(clients, rate, noise, privacy.delta)


def sampled_clients(config: Config, round: int) -> list[str]:
    """Return the clients of a round, in the config's order; there may be none."""
    names = [client.name for client in config.clients]
    random = step_generator(config.privacy.noise_seed, "sampled clients", round)
    rate = client_privacy(config).sampling_rate
    return [names[number] for number in poisson_sample(random, len(names), rate)]


def spent(config: Config, rounds: int) -> float | None:
    """Return the epsilon of so many rounds; None where nothing is private."""
    if not config.privacy.by_client or config.privacy.noise_seed is not None:
        return None
    found = client_privacy(config).epsilon(rounds)
    return found if math.isfinite(found) else None


class PrivateMean:
    """The mean of one round's uploads with noise.

    expected: slots and shapes of an upload. download: what all clients started from; start: where
    they did before any training.
    """

    def __init__(
        self, config: Config, round: int, expected: Shapes, download: Download, start: Start
    ) -> None:
        self._privacy, self._clip = client_privacy(config), config.privacy.clip
        self._random = step_generator(config.privacy.noise_seed, "mean of clients", round)
        self._origin: dict[Slot, Tensor] = {}
        for slot, dims in expected.items():
            origin = download[slot] if slot in download else start(slot, dims)
            self._origin[slot] = origin

    def __call__(self, uploads: Iterable[Tensors]) -> dict[Slot, Tensor]:
        """Return the mean, also of no upload at all: then it is noise."""
        sums = {s: torch.zeros_like(t, dtype=torch.float64) for s, t in self._origin.items()}
        for upload in uploads:
            for slot, step in self._cut(upload).items():
                sums[slot] += step
        deviation = self._privacy.noise_multiplier * self._clip
        expected = self._privacy.sampling_rate * self._privacy.clients
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
