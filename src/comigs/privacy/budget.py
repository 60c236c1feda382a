"""A budget says what a run may spend on one client's text, and counts it before it is spent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, TypeAdapter, ValidationError

from comigs.config import Config, Section
from comigs.errors import UserError
from comigs.files import ClosedFolder, writing
from comigs.privacy.accountant import Steps, epsilon, noise_multiplier_for

# What an owner allows is counted at this delta or the run's, whichever is smaller: an epsilon says
# nothing without one, and a server chooses the run's.
OWNERS_DELTA = 1e-5
SPENT = "privacy budget spent"  # all that a server learns of it


class BudgetSpent(Exception):
    """A client's budget does not reach for what is asked; nothing was drawn or trained for it."""


@dataclass(frozen=True)
class Plan:
    """A plan is what a config's [privacy] comes to, by document for a client, by client for a run.

    population: how many documents there are to draw from, or clients. sampling_rate: the
    probability of one to be drawn for a step. steps: of a round; by client, a round is one step.
    """

    population: int
    sampling_rate: float
    noise_multiplier: float
    steps: int
    delta: float

    def epsilon(self, rounds: int) -> float:
        """Return what so many rounds spend."""
        steps = Steps(self.sampling_rate, self.noise_multiplier, rounds * self.steps)
        return epsilon([steps], self.delta)


def plan_for(config: Config, client: str, documents: int) -> Plan:
    """Return the plan of a client with so many documents in train.

    Raises UserError as `require_documents` does.
    """
    require_documents(config, client, documents)
    rate, steps = batch_of(config) / documents, config.client.steps
    noise = noise_for(config, rate, steps * config.rounds)
    return Plan(documents, rate, noise, steps, config.privacy.delta)


def noise_for(config: Config, sampling_rate: float, steps: int) -> float:
    """Return the noise multiplier of a config: as given, or as so many steps need for epsilon."""
    privacy = config.privacy
    if privacy.noise_multiplier is not None:
        return privacy.noise_multiplier
    assert privacy.epsilon is not None, "the config has one of both"
    return noise_multiplier_for(privacy.epsilon, privacy.delta, sampling_rate, steps)


def batch_of(config: Config) -> float:
    """Return how many documents a step has on average."""
    return config.privacy.expected_batch or config.client.batch_size


def require_documents(config: Config, client: str, documents: int) -> None:
    """Refuse a client with too few documents in train, or with too many for delta.

    Their number is taken as known to everybody, as everywhere with DP-SGD. Raises UserError.
    """
    privacy, batch = config.privacy, batch_of(config)
    if documents < batch:
        raise UserError(
            f"client {client}: {documents:,} documents in train, but a step learns from {batch:g} "
            f"on average; give it more, or set privacy.expected_batch to {documents} or less"
        )
    if privacy.delta >= 1 / documents:
        raise UserError(
            f"privacy.delta: given {privacy.delta:g}, but client {client} has {documents:,} "
            f"documents in train; must be below 1 / {documents:,} = {1 / documents:.2g}"
        )


class Entry(Section):
    """An entry is one round that was begun, whether or not it came to an end."""

    run: str
    round: int
    sampling_rate: float = Field(gt=0, le=1)
    noise_multiplier: float = Field(ge=0)
    steps: int = Field(ge=0)


ENTRIES: TypeAdapter[list[Entry]] = TypeAdapter(list[Entry])


class Ledger:
    """A ledger is a file with every round for which noise was drawn on one client's text.

    It is written before the noise is drawn, and no rewinding of a run takes it back. So a round
    that is asked for again counts again.
    """

    def __init__(self, folder: ClosedFolder, name: str) -> None:
        """Count in the file of this name in a folder, where it may not be yet."""
        self._folder, self._name = folder, name

    @property
    def path(self) -> Path:
        """Where the file is."""
        return self._folder.path / self._name

    def entries(self) -> list[Entry]:
        """Return all rounds so far. Raises UserError where the file is damaged."""
        if not self._folder.has(self._name):
            return []
        try:
            return ENTRIES.validate_json(self._folder.read(self._name))
        except (OSError, ValidationError):
            raise UserError(
                f"{self.path}: damaged, and it says what privacy was spent; restore it from a copy"
            ) from None

    def add(self, entry: Entry) -> None:
        """Count a round. Raises UserError where the disk refuses."""
        raw = ENTRIES.dump_json([*self.entries(), entry], indent=1)
        with writing(self.path.parent, "make room or allow writing; nothing was trained"):
            self._folder.write(self._name, lambda path: path.write_bytes(raw))


@dataclass(frozen=True)
class Budget:
    """A budget is what a run may spend of a client's text, and where what it spends is counted.

    run: its name in the ledger. most: the run's epsilon; None: as much as its rounds take. owner:
    the most that all runs together may spend, as the text's owner says; None: no limit.
    """

    plan: Plan
    ledger: Ledger
    run: str
    most: float | None = None
    owner: float | None = None

    def spend(self, round: int) -> float:
        """Count a round's steps, before their noise is drawn; return the run's epsilon with them.

        Raises BudgetSpent, and counts nothing, where the budget does not reach.
        """
        # A round that was begun before counts again: its noise may have been seen.
        plan, before = self.plan, self.ledger.entries()
        entry = Entry(
            run=self.run,
            round=round,
            sampling_rate=plan.sampling_rate,
            noise_multiplier=plan.noise_multiplier,
            steps=plan.steps,
        )
        everything = [*before, entry]
        here = _epsilon([e for e in everything if e.run == self.run], plan.delta)
        if self.most is not None and not here <= self.most:
            raise BudgetSpent(_line(round, here, f"{self.most:g} (privacy.epsilon)"))
        if self.owner is not None:
            delta = min(plan.delta, OWNERS_DELTA)
            if not (total := _epsilon(everything, delta)) <= self.owner:
                allowed = f"{self.owner:g} in all runs, at delta {delta:g} (--max-epsilon),"
                raise BudgetSpent(_line(round, total, allowed))
        self.ledger.add(entry)
        return here

    def require_counted(self, rounds: int) -> None:
        """Refuse to go on where fewer rounds were counted than this run has done here.

        Raises UserError: the ledger is missing, or an older one.
        """
        counted = sum(entry.run == self.run for entry in self.ledger.entries())
        if counted < rounds:
            raise UserError(
                f"{self.ledger.path}: counts {counted} rounds of a run that has done {rounds}, so "
                "what was spent is not known any more; restore it from a copy"
            )


def _epsilon(entries: Sequence[Entry], delta: float) -> float:
    steps = [Steps(e.sampling_rate, e.noise_multiplier, e.steps) for e in entries]
    return epsilon(steps, delta)


def _line(round: int, would_be: float, allowed: str) -> str:
    spent = "no bound" if math.isinf(would_be) else f"epsilon {would_be:.3g}"
    return f"round {round}: {SPENT}: with it {spent}, and {allowed} is allowed"


def run_budget(config: Config, client: str, documents: int, ledger: Ledger, run: str) -> Budget:
    """Return a client's budget in a run of this config. Raises UserError as `plan_for` does."""
    return Budget(plan_for(config, client, documents), ledger, run, config.privacy.epsilon)
