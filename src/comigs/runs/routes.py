"""Where the tokens of a text go, as `comigs routes` says it in JSON, on its page and in a report.

A generalist weight is the routing weight of all experts that a client shares, together, on one
token in one block. L blocks, counted from 0. Tokens go to one of two sides: to generalists or to
specialists; or, where everybody's generalist is beside a client's own experts, to what all know or
to its own, which has a generalist and a specialist in it.
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
Sides = tuple[str, str]
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
    """The tokens with the highest and the lowest mean weight in one block, the outermost first.

    No token is in both, and there are none where all have the same weight.
    """

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

    run: the run folder's name. routing: what the router weighs (ExpertsSection.routing).
    beside_others: the generalist weight is that of everybody's generalist, beside the client's own
    experts. text: "test", or the name of a file. languages: by code, how many words are in
    paragraphs whose function words are of that language, "none" where no list fits. every: all
    tokens that were read. kinds and frequencies: the same tokens in groups, each token in one of
    either. extremes: by block. passage: the first tokens as they stand, text and all.
    """

    run: str
    method: str
    base: str
    seed: int
    client: str
    routing: Literal["token", "sequence", "client"]
    beside_others: bool
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
    def sides(self) -> Sides:
        """Both sides in words."""
        return sides_in_words(self.beside_others)

    @property
    def who(self) -> str:
        """Which model this is, in words, and whether no token goes to the first side."""
        closed = "" if any(self.every.mean) else f", {nothing_to(self.sides)}"
        return (
            f"{self.client} of {self.run} ({self.method} on {self.base}), "
            f"routed by {self.routing}{closed}"
        )


def sides_in_words(beside_others: bool) -> Sides:
    """Return the two sides to which tokens go: what clients share, and what they do not."""
    return ("what all know", "its own") if beside_others else ("generalists", "specialists")


def nothing_to(sides: Sides) -> str:
    """Say of a model that nothing goes to the first side."""
    return f"no token to {sides[0]}"
