"""The whole config, and what must fit together in it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from comigs.config.sections import (
    BaseSection,
    ClientEntry,
    ClientSection,
    DataSection,
    EvaluationSection,
    ExpertsSection,
    ParticipationSection,
    Section,
    Text,
    UploadSection,
)
from comigs.errors import UserError, nearest
from comigs.slots import expert_parts

VERSION = 1


class Config(Section):
    """A whole run: what, on what, with which settings."""

    version: int = Field(VERSION, ge=1, le=VERSION, description="of this file's format")
    name: str = Field(
        "run",
        description="of the run, and of its folder in `runs`; default: the config file's, without .toml",
    )
    seed: int = Field(42, ge=0, description="the one seed everything random comes from")
    method: str = Field(
        "comigs", description="a file of comigs/methods, or package.module of your own"
    )
    rounds: int = Field(20, ge=1, description="exchanges with the server")
    workers: int = Field(
        1,
        ge=1,
        description="processes that clients of a round are spread over, each with its base, CPU threads or GPU",
    )
    base: BaseSection = Field(
        BaseSection(), description="the frozen language model all clients share"
    )
    data: DataSection = Field(DataSection(), description="how text becomes windows of tokens")
    experts: ExpertsSection = Field(ExpertsSection(), description="what every client trains")
    client: ClientSection = Field(ClientSection(), description="how every client trains in a round")
    evaluation: EvaluationSection = Field(
        EvaluationSection(), description="what is measured during the run"
    )
    participation: ParticipationSection = Field(
        ParticipationSection(),
        description="who is asked in a round, and what becomes of who does not answer",
    )
    upload: UploadSection = Field(
        UploadSection(), description="how uploads travel, are checked and become one"
    )
    options: Mapping[str, bool | int | float | str] = Field(
        {}, description="settings of the method's own; `comigs list methods` shows them"
    )
    clients: tuple[ClientEntry, ...] = Field(description="who takes part, one [[clients]] each")

    @field_validator("name")
    @classmethod
    def _name_is_a_folder_name(cls, value: str) -> str:
        if value.startswith(".") or not value.strip() or re.search(r"[/\\\0]", value):
            raise ValueError("must be a folder's name: no slash, not empty, no dot in front")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if not self.clients:
            raise ValueError(
                'clients: none; write at least one [[clients]] with name = "..." and text = "..."'
            )
        seen: set[str] = set()
        for client in self.clients:
            if client.name.lower() in seen:
                raise ValueError(
                    f'clients: the name "{client.name}" is given twice; names must differ (case aside)'
                )
            seen.add(client.name.lower())
            shape = self.shape_of(client)
            if shape.num_experts == 0:
                raise ValueError(
                    f"clients.{client.name}: 0 experts; give it at least one (experts.generalists or specialists)"
                )
        self._check_participation()
        if self.data.valid_fraction + self.data.test_fraction >= 1:
            raise ValueError(
                "data: valid_fraction + test_fraction must leave documents for train (sum below 1)"
            )
        return self

    def _check_participation(self) -> None:
        p, clients = self.participation, len(self.clients)
        if p.clients_per_round is not None and p.clients_per_round > clients:
            raise ValueError(
                f"participation.clients_per_round: given {p.clients_per_round}, but there are {clients} clients; "
                f"allowed: 1 to {clients}"
            )
        asked = p.clients_per_round or clients
        if p.min_clients > asked:
            raise ValueError(
                f"participation.min_clients: given {p.min_clients}, but {asked} clients are asked in a round; "
                f"allowed: 1 to {asked}"
            )
        weighed = [c.name for c in self.clients if c.weight is not None]
        if weighed and (missing := [c.name for c in self.clients if c.weight is None]):
            raise ValueError(
                f"clients.{missing[0]}.weight: missing, but {weighed[0]} has one; give every client a weight or none"
            )

    @property
    def numbers_experts(self) -> bool:
        """Whether it says how many experts, or how large specialists, there are; else a method may
        choose.
        """
        e = self.experts
        of_clients = (n for c in self.clients for n in (c.specialists, c.specialist_rank))
        return any(
            n is not None for n in (e.generalists, e.specialists, e.specialist_rank, *of_clients)
        )

    def shape_of(self, client: ClientEntry) -> ExpertShape:
        """The experts of one client, its exceptions applied to the defaults."""
        e = self.experts
        rank = client.rank or e.rank
        specialists = e.specialists if client.specialists is None else client.specialists
        return ExpertShape(
            generalists=1 if e.generalists is None else e.generalists,
            specialists=1 if specialists is None else specialists,
            rank=rank,
            specialist_rank=client.specialist_rank or e.specialist_rank or rank,
            attention_rank=e.attention_rank or e.rank,
        )

    def client_named(self, name: str) -> ClientEntry:
        """The entry of that name. Raises UserError naming the clients there are."""
        for client in self.clients:
            if client.name == name:
                return client
        names = [c.name for c in self.clients]
        raise UserError(
            f'no client "{name}" in this run; there are: {", ".join(names)}.{nearest(name, names)}'
        )


class ExpertShape(Section):
    """How many experts one client has, and their ranks.

    rest: whether the rest of the world is beside them, of `rank`; the router is wholly "open" to
    it, or "gated".
    """

    generalists: int
    specialists: int
    others: Literal["none", "open", "gated"] = "none"
    rank: int
    specialist_rank: int
    attention_rank: int

    @property
    def num_experts(self) -> int:
        return self.generalists + self.specialists + (self.others != "none")

    @property
    def parts(self) -> list[str]:
        """Their names, in the router's order."""
        return expert_parts(self.generalists, self.specialists, self.others != "none")


SECTIONS: Mapping[str, type[BaseModel]] = {
    "": Config, "base": BaseSection, "data": DataSection, "experts": ExpertsSection, "client": ClientSection,
    "evaluation": EvaluationSection, "participation": ParticipationSection, "upload": UploadSection,
    "clients": ClientEntry, "text": Text,
}  # fmt: skip


def dotted(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each leaf of a tree by its path, as --set names it: "client.lr"."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
