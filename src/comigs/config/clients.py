"""This module holds what a config says of one client, and the experts that follow from it."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from comigs.config.sections import RouterData, Section
from comigs.slots import OTHERS, expert_parts, experts_of


class Text(Section):
    """A client's text with its splits given, each as "source:argument" or a path."""

    train: str = Field(description="The experts learn from this text.")
    valid: str = Field(description="The router learns from this text, and by it a client chooses.")
    test: str = Field(description="The result is measured on this text, and nothing else is.")


FILE_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"


class ClientEntry(Section):
    """[[clients]] describes one client; [experts] says what is None here."""

    name: str = Field(
        description="A client's name has letters, digits, '.', '_' and '-'. Its folder in the run "
        "is called so, too."
    )
    text: str | Text | None = Field(
        None,
        description='The text is "source:argument" or a path, split by hash, or {train = ..., '
        "valid = ..., test = ...}. None: the text is on the client's own device (engine flower).",
    )
    specialists: int | None = Field(
        None,
        ge=0,
        description="The client has this many specialists. None: experts.specialists.",
    )
    rank: int | None = Field(
        None,
        ge=1,
        description="This client's generalists have this LoRA rank. None: experts.rank.",
    )
    specialist_rank: int | None = Field(
        None,
        ge=1,
        description="Its specialists have this LoRA rank. None: experts.specialist_rank.",
    )
    router_data: RouterData | None = Field(
        None,
        description="The client's router learns from this. None: client.router_data.",
    )
    weight: float | None = Field(
        None,
        gt=0,
        description="The client counts this much where a method weighs clients by their text. "
        "None: its train tokens in-process, and 1 in a federation, where no client's own claim "
        "counts.",
    )

    @field_validator("name")
    @classmethod
    def _name_is_a_file_name(cls, value: str) -> str:
        if not re.fullmatch(FILE_NAME, value):
            raise ValueError(
                "1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit"
            )
        return value


class ExpertShape(Section):
    """An expert shape says how many experts one client has, and their ranks.

    others: whether the others' mean generalists are beside the client's own experts, as one of all
    their ranks; the router is wholly "open" to it, or "gated".
    """

    generalists: int
    specialists: int
    others: Literal["none", "open", "gated"] = "none"
    rank: int
    specialist_rank: int
    attention_rank: int

    @property
    def num_experts(self) -> int:
        """The number of experts that the router weighs."""
        return len(self.experts)

    @property
    def experts(self) -> list[tuple[str, ...]]:
        """The experts, in the router's order, by the parts that each is the sum of."""
        return experts_of(self.parts)

    @property
    def parts(self) -> list[str]:
        """The names of the LoRA that experts are made of."""
        return expert_parts(self.generalists, self.specialists, self.others != "none")

    def rank_of(self, part: str) -> int:
        """Return the rank of one of the parts."""
        if part == OTHERS:
            return self.rank * self.generalists
        return self.specialist_rank if part.startswith("s") else self.rank
