"""Where the tokens of a text go, as `comigs routes` says it in JSON, on its page and in a report.

A generalist weight is the routing weight of all experts that a client shares, together, on one
token in one block. L blocks, counted from 0.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from comigs.runs.record import Record

Kind = Literal[
    "function words",
    "content words",
    "names",
    "numbers",
    "punctuation",
    "beginnings of words",
    "inside words",
    "spaces",
    "separators",
]
Frequency = Literal["frequent", "in between", "rare"]
KINDS: tuple[Kind, ...] = Kind.__args__  # type: ignore[attr-defined]
FREQUENCIES: tuple[Frequency, ...] = Frequency.__args__  # type: ignore[attr-defined]

GeneralistWeight = Annotated[float, Field(ge=0, le=1)]
OfBlocks = Annotated[list[GeneralistWeight], Field(min_length=1)]


class Group(Record):
    """A group of tokens has so many tokens, and by block the mean and the deviation of its weights.

    Both are of no block where the group is empty.
    """

    name: str
    tokens: int
    mean: list[GeneralistWeight]
    deviation: list[GeneralistWeight]


class Ranked(Record):
    """A token of the vocabulary as text, how often it is read, and its mean weight in a block."""

    text: str
    times: int
    weight: GeneralistWeight


class Extremes(Record):
    """The tokens with the highest and the lowest mean weight in one block, the outermost first."""

    most_generalist: list[Ranked]
    most_specialist: list[Ranked]


class RoutedToken(Record):
    """A token where it stands: its text, what kind of token it is, and its weight by block."""

    text: str
    kind: Kind
    weights: OfBlocks

    @property
    def mean(self) -> float:
        """The mean of its weights over all blocks."""
        return sum(self.weights) / len(self.weights)


class Routes(Record):
    """Where the tokens of one text go in one client's own model.

    run: the run folder's name. routing: what the router weighs (ExpertsSection.routing). text:
    "test", or the name of a file. languages: by code, how many words are in paragraphs whose
    function words are of that language, "none" where no list fits. every: all tokens that
    were read. kinds and frequencies: the same tokens in groups, each token in one of either.
    extremes: by block. passage: the first tokens as they stand, text and all.
    """

    run: str
    method: str
    base: str
    seed: int
    client: str
    routing: Literal["token", "sequence", "client"]
    text: str
    languages: dict[str, int]
    every: Group
    kinds: list[Group]
    frequencies: list[Group]
    extremes: list[Extremes]
    passage: list[RoutedToken]

    @property
    def blocks(self) -> int:
        """The number of blocks, L."""
        return len(self.every.mean)

    @property
    def who(self) -> str:
        """Which model this is, in words, and whether it gives no token what all know."""
        closed = "" if any(self.every.mean) else ", no token to what all know"
        return (
            f"{self.client} of {self.run} ({self.method} on {self.base}), "
            f"routed by {self.routing}{closed}"
        )
