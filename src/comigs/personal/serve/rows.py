"""The rows of a forward pass: sequences under way, each with its own client, its own keys and
values.

A pass runs the tokens of all its rows as one packed sequence (1, T): a row that reads its prompt
has many tokens in it, a row that writes has one. Nothing is padded, so a row can join and leave
between any two passes. The modules that replace those of the base find the pass in `PASS`, for the
forward pass of a `transformers` model would not hand it to an MLP.

T tokens of a pass, N tokens of one row in it, L tokens of a row so far; H heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from comigs.personal.serve.packed import PackedClient

FIRST_CAPACITY = 64  # tokens for which a row's keys and values have room at first


class Memory:
    """Keys and values of one row in one block, which grow by doubling."""

    def __init__(self) -> None:
        self.length = 0
        self._keys_HLd: Tensor | None = None
        self._values_HLd: Tensor | None = None

    def append(self, keys_HNd: Tensor, values_HNd: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values of N tokens; return those of all L tokens so far, each (H, L,
        d).
        """
        end = self.length + keys_HNd.shape[1]
        self._keys_HLd = _with_room(self._keys_HLd, keys_HNd, self.length, end)
        self._values_HLd = _with_room(self._values_HLd, values_HNd, self.length, end)
        self._keys_HLd[:, self.length : end] = keys_HNd
        self._values_HLd[:, self.length : end] = values_HNd
        self.length = end
        return self._keys_HLd[:, :end], self._values_HLd[:, :end]

    def copy(self) -> Memory:
        """Return a memory that holds the same and goes its own way from here."""
        other = Memory()
        if self._keys_HLd is not None and self._values_HLd is not None:
            other.append(self._keys_HLd[:, : self.length], self._values_HLd[:, : self.length])
        return other


def _with_room(held_HLd: Tensor | None, new_HNd: Tensor, length: int, needed: int) -> Tensor:
    """Return `held_HLd`, or a larger copy of it where it has no room for `needed` tokens."""
    if held_HLd is not None and held_HLd.shape[1] >= needed:
        return held_HLd
    capacity = max(FIRST_CAPACITY, needed, 2 * length)
    larger = new_HNd.new_empty(new_HNd.shape[0], capacity, new_HNd.shape[2])
    if held_HLd is not None:
        larger[:, :length] = held_HLd[:, :length]
    return larger


class Row:
    """One sequence under way. `length` counts the tokens that the base has read."""

    def __init__(self, client: PackedClient) -> None:
        self.client = client
        self.length = 0
        self.memories = [Memory() for _ in client.blocks]
        # Sum over the tokens so far of what each block's router read (D,): only for routing =
        # "sequence".
        self.router_sums: dict[int, Tensor] = {}

    def rewind(self, length: int) -> bool:
        """Forget all but the first tokens. Returns False where that cannot be done, and does
        nothing.
        """
        if self.router_sums and length < self.length:
            return False
        self.length = length
        for memory in self.memories:
            memory.length = length
        return True

    def fork(self) -> Row:
        """Return a row that has read the same tokens and goes its own way from here."""
        other = Row(self.client)
        other.length = self.length
        other.memories = [memory.copy() for memory in self.memories]
        other.router_sums = {layer: total.clone() for layer, total in self.router_sums.items()}
        return other


@dataclass(frozen=True)
class Span:
    """Where the tokens of a row are among the T tokens of a pass, and at which position the first
    of them is.
    """

    row: Row
    at: slice
    position: int


@dataclass(frozen=True)
class Group:
    """The neighbouring rows of a pass that belong to one client."""

    client: PackedClient
    spans: tuple[Span, ...]

    @property
    def at(self) -> slice:
        """Where their tokens are among the T tokens of the pass."""
        return slice(self.spans[0].at.start, self.spans[-1].at.stop)


@dataclass(frozen=True)
class Pass:
    """The rows of one forward pass, those of one client next to each other.

    routes: gets the routing weights (N, E) of each block and group, in the order in which they are
    made; None: nobody wants them.
    """

    groups: tuple[Group, ...]
    ids: list[int] = field(repr=False)
    routes: list[Tensor] | None = None

    @property
    def spans(self) -> list[Span]:
        """Return the rows in the order of their tokens."""
        return [span for group in self.groups for span in group.spans]


def make_pass(rows: Iterable[tuple[Row, list[int]]]) -> Pass:
    """Pack rows and the tokens that each of them reads now. Rows of one client become
    neighbours.
    """
    ordered = sorted(rows, key=lambda entry: entry[0].client.number)
    ids: list[int] = []
    groups = []
    for _, members in groupby(ordered, key=lambda entry: entry[0].client.number):
        spans = []
        for row, tokens in members:
            spans.append(Span(row, slice(len(ids), len(ids) + len(tokens)), row.length))
            ids.extend(tokens)
        groups.append(Group(spans[0].row.client, tuple(spans)))
    return Pass(tuple(groups), ids)


PASS: ContextVar[Pass] = ContextVar("PASS")


def positions(this: Pass, device: torch.device) -> Tensor:
    """Return the position of each token in its own row (1, T)."""
    parts = [torch.arange(s.position, s.position + s.at.stop - s.at.start) for s in this.spans]
    return torch.cat(parts)[None].to(device)
