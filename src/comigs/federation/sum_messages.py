"""This module is what server and device say to each other of a round's sum. No flwr.

Before a round: "announce" (a device's own key), where one is not known, then "seal". The round
itself is an "exchange" as ever, whose upload is masked. After it: "open".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from comigs.server.sums import MOST
from comigs.server.wire import Head, WireError

if TYPE_CHECKING:
    from comigs.server.secure_sum.session import Session

Name = Annotated[str, Field(pattern=r"^0[23][0-9a-f]{64}$")]  # a public key: a point of P-256
SessionId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Names = Annotated[tuple[Name, ...], Field(max_length=MOST)]
# A run's id is also a folder's name on the device.
RunId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9-]{7,63}$")]
SUM = "sum"  # the one tensor of a masked upload: (N,) int32, whole numbers modulo 2^32
ROWS = "rows"  # the one tensor of what is said of or to each member: (members, bytes) uint8
LONGEST = 512  # bytes of a row


class SumRequest(Head):
    """A request says this of the sum that it is for.

    session, members, threshold: as in a Session. keys: of those that sealed, in the order of the
    members; "" for the others. came: whose masked uploads came.
    """

    session: SessionId
    members: Names
    threshold: PositiveInt
    keys: Annotated[tuple[Name | Literal[""], ...], Field(max_length=MOST)] = ()
    came: Names = ()


def request_of(
    session: Session, keys: tuple[str, ...] = (), came: tuple[str, ...] = ()
) -> SumRequest:
    """Return what a device is told of a session, and perhaps whose masks cancel and who came."""
    return SumRequest(
        session=session.id,
        members=session.members,
        threshold=session.threshold,
        keys=keys,
        came=came,
    )


class Announced(Head):
    """A device says which key it is a member by.

    answered: the last round that it has answered. opened: whose sum of this round it has helped to
    open already, before the server died; it opens no other.
    """

    kind: Literal["announced"] = "announced"
    run: RunId
    round: PositiveInt
    answered: Annotated[int, Field(ge=0)]
    key: Name
    opened: Names = ()


class SealedRound(Head):
    """A device takes part. key: for its masks; the tensor has a sealed box for each other member.
    answered: as above.
    """

    kind: Literal["sealed"] = "sealed"
    run: RunId
    round: PositiveInt
    answered: Annotated[int, Field(ge=0)]
    session: SessionId
    key: Name


class OpenedRound(Head):
    """A device helps to open a sum. own_seed: hex; the tensor has a share of each other member."""

    kind: Literal["opened"] = "opened"
    run: RunId
    round: PositiveInt
    session: SessionId
    own_seed: str = Field(pattern=r"^[0-9a-f]{62}$")


def rows(of: Mapping[str, bytes], members: Sequence[str]) -> dict[str, Tensor]:
    """Return the bytes that go with members as a tensor, in their order; zeros where none do."""
    length = max((len(row) for row in of.values()), default=1)
    content = b"".join(of.get(member, bytes(length)) for member in members)
    table = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return {ROWS: table.reshape(len(members), length)}


def read_rows(
    tensors: Mapping[str, Tensor], members: Sequence[str], length: int | None = None
) -> dict[str, bytes]:
    """Return the bytes that go with each member. Raises WireError for another kind of tensor.

    length: of a row, where it is known.
    """
    table = tensors.get(ROWS)
    if (
        table is None
        or table.dtype != torch.uint8
        or table.dim() != 2
        or table.shape[0] != len(members)
        or table.shape[1] > LONGEST
        or table.shape[1] != (length or table.shape[1])
    ):
        raise WireError("a table that does not fit the members of the sum")
    return {member: bytes(row.tolist()) for member, row in zip(members, table, strict=True)}
