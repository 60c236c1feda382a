"""This module holds the section of a config that says what simulated clients' devices are like.

A figure of one client counts before that of its group, and that before the one for all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import Field, field_validator, model_validator

from comigs.config.sections import Section
from comigs.config.trace import read_trace

EITHER = (  # of these figures, one level's replace those of a more general one together
    ("tokens_per_second", "speed"),
    ("on", "off", "trace"),
    ("specialists", "specialists_rate"),
)
SPECIALISTS_RANGE = (1, 3)  # where a rate is given and no range


class Condition(Section):
    """A condition says what a device and its link are like; None is without any limit."""

    tokens_per_second: float | None = Field(
        None,
        ge=1e-3,
        description="A client trains on this many tokens per second. None: it takes no time.",
    )
    speed: float | None = Field(
        None,
        ge=1e-6,
        description="A client is this many times as fast as this machine, whose tokens per second "
        "are measured when the run begins. In place of tokens_per_second.",
    )
    upload: float | None = Field(
        None,
        ge=1,
        description="A client sends this many bytes per second. None: sending takes no time.",
    )
    download: float | None = Field(
        None, ge=1, description="A client receives this many bytes per second, likewise."
    )
    latency: float | None = Field(
        None,
        ge=0,
        le=1e6,
        description="A message is under way for this many seconds beside its bytes.",
    )
    on: float | None = Field(
        None,
        ge=1,
        le=1e9,
        description="A client is there for this many seconds at a time, on average: a Markov chain "
        "of two states. Needs off.",
    )
    off: float | None = Field(
        None,
        ge=1,
        le=1e9,
        description="A client is away for this many seconds at a time, on average.",
    )
    trace: str | None = Field(
        None,
        description="When clients are there, in place of on and off: a CSV file beside the config "
        "file with the columns client, seconds and available (1 or 0 from then on), sorted, from "
        "second 0 on to beyond the end of the run. Its text goes into the run.",
    )
    dropout: float | None = Field(
        None,
        ge=0,
        le=1,
        description="A client that is asked drops out on its way with this probability, and what "
        "it did since it was asked is lost.",
    )
    spread: float | None = Field(
        None,
        ge=0,
        le=3,
        description="Clients' speeds and bandwidths differ from these figures by factors whose "
        "logarithm has this standard deviation, drawn once per client.",
    )
    jitter: float | None = Field(
        None,
        ge=0,
        le=3,
        description="Speed, bandwidth and latency differ likewise each time a client is asked.",
    )
    specialists: tuple[tuple[int, int], ...] | None = Field(
        None,
        description="A client's memory changes: [[5, 2], [9, 0]] gives it 2 specialists from round "
        "5 on and none from round 9 on, in place of its own number.",
    )
    specialists_rate: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Before each round from the second on, a client gains or loses a specialist "
        "with this probability; at the end of specialists_range it stays as it is instead.",
    )
    specialists_range: tuple[int, int] | None = Field(
        None,
        description="The least and the most specialists that specialists_rate leads to. None: 1 "
        "and 3.",
    )

    @field_validator("trace")
    @classmethod
    def _is_a_trace(cls, text: str | None) -> str | None:
        if text is not None:
            read_trace(text)
        return text

    @field_validator("specialists", mode="before")
    @classmethod
    def _are_pairs(cls, given: object) -> object:
        for pair in given if isinstance(given, (list, tuple)) else ():
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise ValueError(f"holds {pair}; must be [[round, number], ...]")
        return given

    @field_validator("specialists")
    @classmethod
    def _in_order(cls, pairs: tuple[tuple[int, int], ...] | None) -> object:
        rounds = [round for round, _ in pairs or ()]
        if rounds != sorted(set(rounds)) or any(round < 1 for round in rounds):
            raise ValueError("rounds must be from 1 on and in order, each once")
        if any(not 0 <= number <= 256 for _, number in pairs or ()):
            raise ValueError("a client has 0 to 256 specialists")
        return pairs

    @field_validator("specialists_range")
    @classmethod
    def _low_and_high(cls, pair: tuple[int, int] | None) -> tuple[int, int] | None:
        if pair is not None and not 0 <= pair[0] < pair[1] <= 256:
            raise ValueError("must be [least, most], least below most, from 0 to 256")
        return pair

    @model_validator(mode="after")
    def _one_way_each(self) -> Condition:
        if self.tokens_per_second is not None and self.speed is not None:
            raise ValueError("tokens_per_second and speed: give one of them")
        if (self.on is None) != (self.off is None):
            raise ValueError("on and off: give both or neither")
        if self.on is not None and self.trace is not None:
            raise ValueError("trace: given together with on and off; give one of them")
        if self.specialists and self.specialists_rate:
            raise ValueError("specialists and specialists_rate: give one of them")
        return self


class Group(Condition):
    """A group is a share of the clients with figures of its own."""

    share: float = Field(
        gt=0,
        le=1,
        description="Each client is in this group with this probability, drawn by its name. Who is "
        "in none has the figures for all.",
    )


class ConditionsSection(Condition):
    """[conditions] says what devices and links to simulate, in one process (docs/conditions.md)."""

    file: str | None = Field(
        None,
        description="The [conditions] of this file beside the config file hold where nothing is "
        "said here; they go into the run.",
    )
    machine: float | None = Field(
        None,
        ge=1e-3,
        description="This machine trains on so many tokens per second. None: it is measured when "
        "the run begins, where any speed asks for it, and goes into the run.",
    )
    patience: float = Field(
        30.0,
        ge=0,
        le=1e9,
        description="A round waits for this many seconds for clients that are away to come back.",
    )
    noticed: float = Field(
        45.0,
        ge=0,
        le=1e9,
        description="The server learns after this many seconds that a client is lost: Flower's "
        "nodes tell every 30 that they are there, and are given up after 60.",
    )
    groups: Mapping[str, Group] = Field(
        {}, description="[conditions.groups.NAME] is a share of the clients."
    )
    clients: Mapping[str, Condition] = Field(
        {}, description="[conditions.clients.NAME] is one client."
    )

    @property
    def given(self) -> bool:
        """Whether anything is to be simulated."""
        return any(merged([condition]) != Condition() for condition in self.everyone())

    def group_of(self, client: str, seed: int) -> str | None:
        """Return the name of the group that a client is drawn into, by its name; None for none."""
        from comigs.seeds import generator  # which imports numpy, that nothing else here needs

        point = generator(seed, "conditions", "group", client).random()
        for name, group in self.groups.items():
            point -= group.share
            if point < 0:
                return name
        return None

    def everyone(self) -> list[Condition]:
        """Return the figures for all, of every group and of every client."""
        own = Condition(**{key: getattr(self, key) for key in Condition.model_fields})
        groups = [
            Condition(**group.model_dump(exclude={"share"})) for group in self.groups.values()
        ]
        return [own, *groups, *self.clients.values()]

    def possible(self, client: str | None) -> list[Condition]:
        """Return the conditions that a client may have, by the group that it is drawn into.

        client: None stands for all that have no figures of their own.
        """
        everyone, *rest = self.everyone()
        groups = [[group] for group in rest[: len(self.groups)]]
        own = [figures for name, figures in self.clients.items() if name == client]
        return [merged([everyone, *group, *own]) for group in ([], *groups)]

    def require_clients(self, names: Iterable[str]) -> None:
        """Raise ValueError where shares, clients or traces are not those of these clients."""
        # Whoever is named must be there, and whoever is there must be in a trace that is for all.
        known = list(names)
        shares = sum(group.share for group in self.groups.values())
        if shares > 1 + 1e-9:
            raise ValueError(
                f"conditions.groups: the shares are {shares:g} together; at most 1 is allowed"
            )
        for name in self.clients:
            if name not in known:
                raise ValueError(
                    f"conditions.clients.{name}: no such client; there are: {', '.join(known)}"
                )
        usual = self.possible(None)
        for name in known:
            for figures in self.possible(name) if name in self.clients else usual:
                if figures.trace is not None and name not in read_trace(figures.trace):
                    raise ValueError(
                        f"{self._place_of(figures.trace)}: has no line of client {name}; it must "
                        "cover the run"
                    )

    def _place_of(self, trace: str) -> str:
        """Return the address of the first level that gives a trace."""
        places = ["conditions", *(f"conditions.groups.{name}" for name in self.groups)]
        places += [f"conditions.clients.{name}" for name in self.clients]
        levels = zip(places, self.everyone(), strict=True)
        return next(f"{place}.trace" for place, level in levels if level.trace == trace)


def merged(conditions: Iterable[Condition]) -> Condition:
    """Return one condition of several; what is given later counts."""
    values: dict[str, Any] = {}
    for condition in conditions:
        given = {key: v for key, v in condition if v is not None and key in Condition.model_fields}
        values = without_other_ways(values, given) | given
    return Condition.model_validate(values)


def without_other_ways(general: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the general figures without those that own ones say in another way (EITHER)."""
    values = dict(general)
    for ways in EITHER:
        if own.keys() & set(ways):
            values = {key: value for key, value in values.items() if key not in ways}
    return values


class ConditionsFile(Section):
    """A conditions file has [conditions] and nothing else."""

    conditions: ConditionsSection
