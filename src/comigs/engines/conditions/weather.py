"""This module draws what each simulated client meets: device, link, and how much it can hold.

Everything comes from generators named by the client, and by the round and the attempt where it is
drawn anew, so that another client more or less changes nobody else's weather.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from numpy.random import Generator

from comigs.config import SPECIALISTS_RANGE, Condition, Config, merged
from comigs.engines.conditions.availability import Availability
from comigs.seeds import generator


@dataclass(frozen=True)
class Link:
    """A link is what one attempt of a client meets.

    tokens_per_second, upload, download: per second, infinite where it takes no time. latency: in
    seconds. drops_at: the share of its way at which the client drops out; None: it does not.
    """

    tokens_per_second: float
    upload: float
    download: float
    latency: float
    drops_at: float | None


class Weather:
    """The weather of a run, of any client at any moment."""

    def __init__(self, config: Config) -> None:
        """Read the conditions of a config; those of this machine have been measured."""
        self._config, self._seed = config.conditions, config.seed
        self._numbers = {c.name: config.shape_of(c).specialists for c in config.clients}
        self.of = cache(self._of)
        self.availability = cache(self._availability)
        self._factors = cache(self._drawn_factors)

    def _of(self, client: str) -> Condition:
        """Return the figures of a client, whose group is drawn by its name."""
        everyone, *_ = self._config.everyone()
        levels, group = [everyone], self._config.group_of(client, self._seed)
        if group is not None:
            levels.append(self._config.groups[group])
        if client in self._config.clients:
            levels.append(self._config.clients[client])
        return merged(levels)

    def _availability(self, client: str) -> Availability:
        return Availability(self.of(client), self._seed, client)

    def link(self, client: str, round: int, attempt: int) -> Link:
        """Return what a client meets when it is asked in a round; attempt: how often before."""
        own, (speed, bandwidth) = self.of(client), self._factors(client)
        # As much is drawn whatever the figures are, so that one figure changes no other draw.
        random = self._random("link", client, round, attempt)
        now_speed, up, down, lag = (
            math.exp((own.jitter or 0.0) * each) for each in random.normal(size=4)
        )
        drops, where = random.random(size=2)
        tokens = own.tokens_per_second
        if own.speed is not None:
            assert self._config.machine is not None, "the machine was not measured"
            tokens = own.speed * self._config.machine
        return Link(
            tokens_per_second=(tokens or math.inf) * speed * now_speed,
            upload=(own.upload or math.inf) * bandwidth * up,
            download=(own.download or math.inf) * bandwidth * down,
            latency=(own.latency or 0.0) * lag,
            drops_at=float(where) if drops < (own.dropout or 0.0) else None,
        )

    def _drawn_factors(self, client: str) -> tuple[float, float]:
        """Return by how much a client's speed and bandwidth differ from the figures it has."""
        spread = self.of(client).spread or 0.0
        speed, bandwidth = self._random("spread", client).normal(size=2)
        return math.exp(spread * speed), math.exp(spread * bandwidth)

    def specialists(self, client: str, round: int) -> int | None:
        """Return how many specialists a client has in a round; None where that never changes."""
        own, number = self.of(client), self._numbers[client]
        if own.specialists is not None:
            reached = [count for since, count in own.specialists if since <= round]
            return reached[-1] if reached else number
        if own.specialists_rate is None:
            return None
        least, most = own.specialists_range or SPECIALISTS_RANGE
        for before in range(2, round + 1):
            changes, gains = self._random("specialists", client, before).random(size=2)
            if changes < own.specialists_rate and gains < 0.5:
                number += number < most
            elif changes < own.specialists_rate:
                number -= number > least
        return number

    def _random(self, *names: str | int) -> Generator:
        return generator(self._seed, "conditions", *names)
