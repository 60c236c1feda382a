"""This module holds the whole config, and what must fit together in it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, Field, field_validator, model_validator

from comigs.config.base import BaseSection
from comigs.config.clients import ClientEntry, ExpertShape, Text
from comigs.config.conditions import Condition, ConditionsSection, Group
from comigs.config.privacy import PrivacySection
from comigs.config.rounds import (
    EvaluationSection,
    ParticipationSection,
    TrackSection,
    UploadSection,
)
from comigs.config.sections import (
    ClientSection,
    DataSection,
    ExpertsSection,
    RouterData,
    Section,
)
from comigs.errors import UserError, nearest

VERSION = 5


def section(kind: type[Section]) -> Any:
    """Return a section as a field of the config, described by the first line of its docstring."""
    return Field(kind(), description=(kind.__doc__ or "").partition("\n")[0])


class Config(Section):
    """A config says all of a run: what is run, on what, with which settings."""

    version: int = Field(
        VERSION,
        ge=1,
        le=VERSION,
        description="This file is written in this version of the format. Older ones are read with "
        "the defaults of then: until 4, ranks of 8, specialists apart, attention the mean.",
    )
    name: str = Field(
        "run",
        description="The run is called so, and its folder in `runs`. Default: the name of the "
        "config file, without .toml.",
    )
    seed: int = Field(
        42,
        ge=0,
        description="Everything random comes from this one seed, but for "
        "privacy's noise and, on devices, the batches of runs with secure aggregation.",
    )
    method: str = Field(
        "comigs",
        description="The method is a file of comigs/methods, or package.module of your own.",
    )
    rounds: int = Field(20, ge=1, description="Clients exchange with the server this many times.")
    workers: int = Field(
        1,
        ge=1,
        description="The clients of a round are spread over this many processes, each with its own "
        "base and its own CPU threads or GPU.",
    )
    base: BaseSection = section(BaseSection)
    data: DataSection = section(DataSection)
    experts: ExpertsSection = section(ExpertsSection)
    client: ClientSection = section(ClientSection)
    evaluation: EvaluationSection = section(EvaluationSection)
    participation: ParticipationSection = section(ParticipationSection)
    upload: UploadSection = section(UploadSection)
    privacy: PrivacySection = section(PrivacySection)
    conditions: ConditionsSection = section(ConditionsSection)
    track: TrackSection = section(TrackSection)
    options: Mapping[str, bool | int | float | str] = Field(
        {}, description="These settings are the method's own; `comigs list methods` shows them."
    )
    clients: tuple[ClientEntry, ...] = Field(
        description="Each [[clients]] is one client that takes part."
    )

    @field_validator("name")
    @classmethod
    def _name_is_a_folder_name(cls, value: str) -> str:
        if value.startswith(".") or not value.strip() or re.search(r"[/\\\0]", value):
            raise ValueError("must be a folder's name: no slash, not empty, no dot in front")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        # each client must be one of its own, with something to train
        if not self.clients:
            raise ValueError(
                'clients: none; write at least one [[clients]] with name = "..." and text = "..."'
            )
        seen: set[str] = set()
        for client in self.clients:
            if client.name.lower() in seen:
                raise ValueError(
                    f'clients: the name "{client.name}" is given twice; '
                    "names must differ (case aside)"
                )
            seen.add(client.name.lower())
            if self.shape_of(client).num_experts == 0:
                raise ValueError(
                    f"clients.{client.name}: 0 experts; give it at least one "
                    "(experts.generalists or specialists)"
                )

        # as many must answer as can be asked, the best round must be one that is known, and train
        # must not be left without text
        self._check_participation()
        self._check_evaluation()
        self._check_sums()
        self._check_privacy()
        self._check_private_mean()
        self.conditions.require_clients(self.names)
        if self.data.valid_fraction + self.data.test_fraction >= 1:
            raise ValueError(
                "data: valid_fraction + test_fraction must leave documents for train (sum below 1)"
            )
        return self

    def _check_participation(self) -> None:
        # a number of clients is measured against those that it is a part of
        p, clients = self.participation, len(self.clients)
        if p.clients_per_round is not None and p.clients_per_round > clients:
            raise ValueError(
                f"participation.clients_per_round: given {p.clients_per_round}, "
                f"but there are {clients} clients; allowed: 1 to {clients}"
            )
        if p.min_clients > self.asked:
            raise ValueError(
                f"participation.min_clients: given {p.min_clients}, "
                f"but {self.asked} clients are asked in a round; allowed: 1 to {self.asked}"
            )

        # given weights and counted tokens are no common measure
        weighed = [c.name for c in self.clients if c.weight is not None]
        missing = [c.name for c in self.clients if c.weight is None]
        if weighed and missing:
            raise ValueError(
                f"clients.{missing[0]}.weight: missing, but {weighed[0]} has one; "
                "give every client a weight or none"
            )

    def _check_privacy(self) -> None:
        if problem := self.privacy.problem():
            raise ValueError(problem)
        for client in self.clients if self.privacy.is_on else ():
            if self.router_data_of(client) == "prior":
                raise ValueError(
                    f'clients.{client.name}.router_data: "prior" follows the routing weights of '
                    "other clients, which depend on their text and have no noise with "
                    'privacy.level; use "entropy" or "train"'
                )
        # which documents are in a share of the text depends on the lengths of all of them
        if self.privacy.by_document and self.data.train_share != 1:
            raise ValueError(
                f"data.train_share: given {self.data.train_share:g} beside privacy.level = "
                '"document", with which one document more may change nothing but itself; must be 1'
            )

    def _check_private_mean(self) -> None:
        # noise is made for a plain sum of steps, of which nobody's comes twice
        wanted = {
            "upload.merge": (self.upload.merge, "mean"),
            "participation.late": (self.participation.late, "drop"),
            "privacy.secure_aggregation": (self.privacy.secure_aggregation, False),
            "privacy.expected_batch": (self.privacy.expected_batch, None),
        }
        for field, (given, allowed) in wanted.items():
            if self.privacy.by_client and given != allowed:
                must = "left out" if allowed is None else json.dumps(allowed)
                raise ValueError(
                    f'{field}: given {json.dumps(given)} beside privacy.level = "client", with '
                    f"which the server adds noise to the sum of all steps; must be {must}"
                )
        if self.privacy.by_client and self.privacy.delta >= 1 / len(self.clients):
            raise ValueError(
                f"privacy.delta: given {self.privacy.delta:g}, but there are {len(self.clients)} "
                f"clients; must be below 1 / {len(self.clients)}"
            )

    def _check_evaluation(self) -> None:
        evaluation, why = self.evaluation, ""
        if evaluation.every == 0:
            why = "evaluation.every = 0 measures valid in no round"
        elif "valid" not in evaluation.splits:
            why = "valid is not among evaluation.splits"
        if why and evaluation.keep == "best":
            raise ValueError(
                f'evaluation.keep: given "best", but {why}; allowed: "last", or "best" with '
                "evaluation.every of 1 or more and valid among evaluation.splits"
            )

    def _check_sums(self) -> None:
        # what looks at a single upload cannot be where the server has their sum alone, and whose
        # upload is late or lost is simulated one by one
        if self.privacy.secure_aggregation and self.conditions.given:
            raise ValueError(
                "conditions: given beside privacy.secure_aggregation, whose messages are not "
                "simulated; leave one of them out"
            )
        wanted = {
            "upload.merge": (self.upload.merge, "mean"),
            "upload.format": (self.upload.format, "float32"),
            "participation.late": (self.participation.late, "drop"),
        }
        for field, (given, allowed) in wanted.items():
            if self.privacy.secure_aggregation and given != allowed:
                raise ValueError(
                    f'{field}: given "{given}" beside privacy.secure_aggregation, with which the '
                    f'server has the sum of uploads and none of them; allowed: "{allowed}"'
                )

    @property
    def names(self) -> list[str]:
        """The clients' names, in the config's order."""
        return [client.name for client in self.clients]

    @property
    def asked(self) -> int:
        """How many clients a round asks."""
        return self.participation.clients_per_round or len(self.clients)

    @property
    def asks_all(self) -> bool:
        """Whether a round asks every client that is not left out."""
        return self.asked == len(self.clients)

    def shape_of(self, client: ClientEntry) -> ExpertShape:
        """Return the experts of one client: the defaults, and its exceptions to them."""
        e = self.experts
        return ExpertShape(
            generalists=e.generalists,
            specialists=e.specialists if client.specialists is None else client.specialists,
            rank=client.rank or e.rank,
            specialist_rank=client.specialist_rank or e.specialist_rank,
            attention_rank=e.attention_rank,
        )

    def router_data_of(self, client: ClientEntry) -> RouterData:
        """Return what one client's router learns from."""
        return client.router_data or self.client.router_data

    def client_named(self, name: str) -> ClientEntry:
        """Return the entry of that name. Raises UserError that names the clients there are."""
        for client in self.clients:
            if client.name == name:
                return client
        raise UserError(
            f'no client "{name}" in this run; there are: {", ".join(self.names)}.'
            f"{nearest(name, self.names)}"
        )


SECTIONS: Mapping[str, type[BaseModel]] = {
    "": Config,
    "base": BaseSection,
    "data": DataSection,
    "experts": ExpertsSection,
    "client": ClientSection,
    "evaluation": EvaluationSection,
    "participation": ParticipationSection,
    "upload": UploadSection,
    "privacy": PrivacySection,
    "conditions": ConditionsSection,
    "conditions.groups": Group,
    "conditions.clients": Condition,
    "track": TrackSection,
    "clients": ClientEntry,
    "clients.text": Text,
}


def dotted(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Give each leaf of a tree with its path as --set names it, as ("client.lr", 2e-3)."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
