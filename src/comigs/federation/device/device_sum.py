"""This module is a device's part in the sum of a round: what it says of it, and what it remembers.

What is remembered is on the disk before anything leaves that follows from it: killed at any moment,
a device masks its numbers for one set of others only, and opens the sum of one set of clients.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from comigs.federation.device.device_run import DeviceRun, Refused, refusing
from comigs.federation.messages import Request
from comigs.federation.security.private_files import write_private
from comigs.federation.sum_messages import (
    SUM,
    Announced,
    OpenedRound,
    SealedRound,
    SumRequest,
    read_rows,
    rows,
)
from comigs.methods.method import Download, Upload
from comigs.server import wire
from comigs.server.secure_sum import party
from comigs.server.secure_sum.primitives import (
    PrivateKey,
    SumError,
    fingerprint,
    new_seed,
    private_key,
    public_name,
)
from comigs.server.secure_sum.session import Session
from comigs.server.secure_sum.uploads import to_sum
from comigs.server.validation import common_start, origin_of, shapes_of

KEY = "sum.key"  # in the device's folder: the seed of the key by which others know it
REMEMBERED = ".sum.json"  # in the run's folder
SEED_BITS = 128


class Remembered(BaseModel):
    """A device remembers this of a run's sums.

    session: of the last one that it sealed. opened_in: the last round of which it helped to open a
    sum; opened: whose sum that was. batch_seed: of the batches that it learns from in this run.
    """

    model_config = ConfigDict(frozen=True, ser_json_bytes="hex", val_json_bytes="hex")
    session: party.Remembered | None = None
    opened_in: int = 0
    opened: tuple[str, ...] = ()
    batch_seed: int = Field(default_factory=lambda: secrets.randbits(SEED_BITS))


class DeviceSum:
    """A device sum is a device's part in the sums of one run."""

    def __init__(self, home: Path, run: DeviceRun, say: Callable[[str], None]) -> None:
        """Go on from what is remembered.

        home: the device's folder. say: called with lines for the owner.
        """
        self._run, self._say = run, say
        self._identity = identity(home)
        self.name = public_name(self._identity)
        files = run.folder.files
        self._remembered = Remembered()
        if files.has(REMEMBERED):
            self._remembered = Remembered.model_validate_json(files.read(REMEMBERED))

    @property
    def batch_seed(self) -> int:
        """The seed of this device's batches in the run, which nobody else knows.

        With the config's seed, a run that is repeated without one client would be the same training
        of all others, and the difference of two sums that client's upload.
        """
        return self._remembered.batch_seed

    def answer(self, request: Request) -> bytes:
        """Answer a request that is of a sum alone. Raises Refused."""
        # What a server needs to know before a sum is said whatever came of an earlier one.
        if request.kind == "announce":
            is_opened = request.round == self._remembered.opened_in
            head = Announced(
                run=request.run,
                round=request.round,
                answered=self._run.answered,
                key=self.name,
                opened=self._remembered.opened if is_opened else (),
            )
            return wire.pack(head)
        try:
            if request.kind == "seal":
                return self._seal(request)
            return self._open(request)
        except SumError as error:
            raise self._refused(request, str(error)) from None

    def is_to_mask_again(self, request: Request) -> bool:
        """Return whether a round that is answered is asked for a sum that it was not masked for,
        because that one came to nothing.
        """
        if request.sum is None or request.round != self._run.answered or not request.train:
            return False
        return self._run.last_answer()[0].session != request.sum.session

    def prepare(self, request: Request, tensors: wire.Encoded) -> party.Remembered:
        """Return what masks an upload of the request's round. Raises Refused where what the server
        sent for it will not do.

        tensors: of the request.
        """
        asked, session = self._asked(request), self._session_of(request)
        members = session.session.members
        if len(asked.keys) != len(members):
            raise self._refused(request, "keys that do not fit the members of the sum")
        keys = {member: key for member, key in zip(members, asked.keys, strict=True) if key}
        try:
            return party.prepare(self._identity, session, keys, read_rows(tensors, members))
        except (SumError, wire.WireError) as error:
            raise self._refused(request, str(error)) from None

    def mask(
        self, prepared: party.Remembered, upload: Upload, download: Download
    ) -> dict[str, Tensor]:
        """Return an upload as it leaves: a step away from the download, cut, and under masks.

        Raises Refused, with "loss" where a number is not finite.
        """
        config, members = self._run.config, prepared.session.members
        begun = origin_of(download, shapes_of(upload), common_start(config.seed))
        try:
            numbers = to_sum(upload, begun, config.upload, len(members))
        except SumError as error:
            raise Refused("loss", f"{self._run.folder.path}: {error}") from None

        # The set of others is remembered before a number of this masking can leave.
        masked = party.mask(prepared, self.name, numbers)
        self._remember(session=prepared)
        return {SUM: torch.from_numpy(masked.view("int32"))}

    def mask_again(
        self, request: Request, tensors: wire.Encoded, upload: Upload, download: Download
    ) -> bytes:
        """Return the last answer with its upload masked for another sum, which is kept in its
        place. upload: as this device has it. Raises Refused.
        """
        head, _ = self._run.last_answer()
        masked = self.mask(self.prepare(request, tensors), upload, download)
        raw = wire.pack(head.model_copy(update={"session": request.session}), masked)
        self._run.say_instead(raw)
        return raw

    def forget(self) -> None:
        """Remove the secrets of the last sum, at the end of a run."""
        self._run.folder.files.remove(REMEMBERED)

    def _seal(self, request: Request) -> bytes:
        asked = self._asked(request)
        session = Session(asked.session, request.run, request.round, asked.members, asked.threshold)
        held = self._remembered.session

        # What is done with is not begun again, nor a session whose masks are out already.
        if request.round < max(self._run.answered, self._remembered.opened_in):
            raise Refused("over", f"{request.run}: asked to seal round {request.round} again")
        if held is not None and held.session.id == session.id and held.keys:
            raise SumError("a session that was masked already")
        self._tell_members(request.run, session)
        held, sealed = party.seal(self._identity, session)
        self._remember(session=held)
        head = SealedRound(
            run=request.run,
            round=request.round,
            answered=self._run.answered,
            session=session.id,
            key=sealed.key,
        )
        return wire.pack(head, rows(sealed.boxes, session.members))

    def _open(self, request: Request) -> bytes:
        asked, held = self._asked(request), self._session_of(request)
        opened = party.help_open(held, self.name, asked.came)

        # Sums of two sets of clients in one round would tell who is in one of them only.
        already, of = self._remembered.opened_in, set(self._remembered.opened)
        if request.round < already or (request.round == already and of != set(asked.came)):
            raise SumError("a round that was opened already, for others")
        self._remember(opened_in=request.round, opened=tuple(asked.came))
        head = OpenedRound(
            run=request.run,
            round=request.round,
            session=held.session.id,
            own_seed=opened.own_seed.hex(),
        )
        return wire.pack(head, rows(opened.shares, held.session.members))

    def _session_of(self, request: Request) -> party.Remembered:
        """Return what is remembered of the request's session. Raises Refused."""
        held, asked = self._remembered.session, self._asked(request)
        if held is None or (held.session.id, held.session.round) != (asked.session, request.round):
            raise Refused("lost", f"{request.run}: asked for a sum that this device did not seal")
        return held

    def _asked(self, request: Request) -> SumRequest:
        if request.sum is None:
            raise self._refused(request, "an upload that is not masked")
        return request.sum

    def _refused(self, request: Request, why: str) -> Refused:
        asked = f"the server asked for {why}"
        return Refused("refused", f"{request.run}: round {request.round}: {asked}")

    def _remember(self, **changes: object) -> None:
        self._remembered = self._remembered.model_copy(update=changes)
        text = self._remembered.model_dump_json()
        with refusing("disk"), self._run.keeping():
            self._run.folder.files.write(REMEMBERED, lambda path: path.write_text(text, "utf-8"))

    def _tell_members(self, run: str, session: Session) -> None:
        """Show the owner whose keys these are, where they are not those of the sum before."""
        held = self._remembered.session
        if held is not None and held.session.members == session.members:
            return
        others = [fingerprint(member) for member in session.members if member != self.name]
        self._say(
            f"{run}: its uploads are summed with those of {len(others)} others; this device's key "
            f"is {fingerprint(self.name)}, theirs are {', '.join(sorted(others))}: compare them "
            "with their owners, for a server could hand out keys of its own"
        )


def identity(home: Path) -> PrivateKey:
    """Return the key by which others know this device, made where it is new. Raises OSError."""
    file = home / KEY
    if not file.exists():
        write_private(file, new_seed().hex())
    return private_key(bytes.fromhex(file.read_text(encoding="utf-8")))
