"""This module is a run on a device: an ordinary run folder with one client, and the last answer, to
be repeated when asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comigs.bases.load import Base
from comigs.client.client import Client
from comigs.client.state import STATE, ClientState
from comigs.config import Config
from comigs.data.prepare import ClientData
from comigs.engines.client_task import added_ranks, unseen
from comigs.errors import UserError
from comigs.federation.messages import ANSWERS, Answered, Code, config_for
from comigs.files import ClosedFolder, writing
from comigs.methods.method import Download, Method, Upload
from comigs.privacy.budget import Budget, BudgetSpent, Ledger, run_budget
from comigs.runs.environment import describe, environment
from comigs.runs.folder import RunFolder
from comigs.runs.metrics import Line, TrainReport
from comigs.runs.summary import write_summary
from comigs.server import wire
from comigs.server.communication import last_download, traffic, with_traffic
from comigs.server.protocol import Reply
from comigs.server.wire import plain
from comigs.slots import Slot


class Refused(Exception):
    """A request is not answered. code: all that the server learns. line: what the device's owner
    reads.
    """

    def __init__(self, code: Code, line: str) -> None:
        super().__init__(line)
        self.code, self.line = code, line


@contextmanager
def refusing(code: Code) -> Iterator[None]:
    """Turn a UserError into a refusal: what is wrong with text, disk, memory or training here is
    told to the owner in full, to the server as a code.
    """
    try:
        yield
    except UserError as error:
        raise Refused(code, str(error)) from None
    except BudgetSpent as spent:
        raise Refused("budget", str(spent)) from None
    except torch.OutOfMemoryError as error:
        raise Refused("memory", f"the memory of the device is full: {error}") from None


class DeviceRun:
    """A device run is what this device has of a run. answered: the last round that it answered, 0
    before the first.
    """

    def __init__(self, folder: RunFolder, config: Config, method: Method) -> None:
        last = folder.rewind()
        self.folder, self.config, self.method = folder, config, method
        (self.name,) = config.names
        # The last exchange comes one round after the last round.
        self.answered = last.round + last.finished

    def state(self) -> ClientState | None:
        """Return what the client goes on from; None: from its start."""
        held = [part for part in STATE if self.folder.holds(self._path(part))]
        return {part: self.folder.load(self._path(part)) for part in held} or None

    def residual(self) -> dict[Slot, Tensor]:
        """Return what rounding left over of its uploads so far (wire.encode)."""
        return {Slot.parse(name): tensor for name, tensor in self._held("residual").items()}

    def encoded(
        self, upload: Upload, download: Download, round: int
    ) -> tuple[dict[str, Tensor], dict[Slot, Tensor]]:
        """Return an upload as it travels, and what rounding left over. Raises Refused."""
        try:
            return wire.encode(upload, download, self.config.upload.format, self.residual())
        except wire.WireError as error:
            raise Refused("loss", f"{self.folder.path}: round {round}: {error}") from None

    def budget(self, data: ClientData, home: Path, most: float | None) -> Budget | None:
        """Return what the run may spend of the text's privacy; None where it bounds nothing.

        home: the device's folder, whose ledger counts the runs of all operators and configs. most:
        the epsilon of all of them together, as the owner says. Raises UserError.
        """
        if not self.config.privacy.by_document:
            return None
        ledger = Ledger(ClosedFolder(home), "privacy.json")
        documents = sum(store.num_documents for store in data.train)
        budget = run_budget(self.config, self.name, documents, ledger, self.folder.path.name)
        return replace(budget, owner=most)

    def unseen(self, download: Download, since: int) -> Download:
        """Return a download without the updates that were added here already.

        since: the last round that the server knows to have reached this client. If that is not its
        last answer, the download begins with what came with that answer's request: the first ranks
        of every update. Raises Refused, with "lost", where an update ends before what was added.
        """
        merged = {} if since >= self.answered else self._held("merged")
        try:
            return unseen(download, {Slot.parse(name): int(rank) for name, rank in merged.items()})
        except LookupError:
            ended = f"the server's updates end before those of round {self.answered}"
            raise Refused("lost", ended) from None

    def is_answered(self, round: int, after: int) -> bool:
        """Return whether the server lacks the last answer, and is to get it again. Raises Refused
        where there is no way on from here.

        round: the server asks for it. after: the last round that the server has an answer of.
        """
        path, last = self.folder.path, self.answered
        # Either folder may have been put back to an earlier state, the server's or this one.
        if round < last:
            raise Refused("over", f"{path}: asked for round {round}, but has answered round {last}")
        if last < after:
            raise Refused(
                "lost",
                f"{path}: ends with round {last}, but round {after} was answered from here",
            )
        return round == self.answered or self.answered > after

    def said(self) -> bytes:
        """Return the last answer, as it was sent. Raises Refused where it is missing."""
        if self.answered > self.config.rounds:
            self._summarize()
        file = self._answer_file(self.answered)
        try:
            return self.folder.files.read(file)
        except OSError:
            problem = f"{self.folder.path / file}: missing; the answer cannot be repeated"
            raise Refused("lost", problem) from None

    def last_answer(self) -> tuple[Answered, dict[str, Tensor]]:
        """Return head and tensors of the last answer. Raises Refused where it is missing."""
        raw = self.said()
        head, tensors = wire.unpack(raw, ANSWERS, len(raw), len(raw))
        assert isinstance(head, Answered)
        return head, tensors

    def say_instead(self, raw: bytes) -> None:
        """Keep another answer in the place of the last one. Raises UserError."""
        with self.keeping():
            self.folder.files.write(self._answer_file(self.answered), lambda p: p.write_bytes(raw))

    def keeping(self) -> AbstractContextManager[None]:
        """Turn what the disk refuses into a UserError."""
        return writing(self.folder.path, "make room or allow writing; the server will ask again")

    def keep(
        self,
        raw: bytes,
        reply: Reply,
        client: Client,
        residual: Mapping[Slot, Tensor],
        download: Download,
    ) -> None:
        """Make this answer what the run is continued from. Raises UserError where the disk
        refuses.
        """
        # After the last round only the client's own model stays: there is nothing to go on with.
        round, finished = reply.round, reply.upload is None
        state = client.state()
        parts: dict[str, Mapping[str, Tensor]] = {"personal": state["experts"]}
        if not finished:
            parts = dict(state)
            if residual:
                parts["residual"] = plain(residual)
            if self.method.merges:
                ranks = added_ranks(download)
                parts["merged"] = {str(slot): torch.tensor(rank) for slot, rank in ranks.items()}
        for part, tensors in parts.items():
            self.folder.stage(self._path(part), tensors, round)
        with self.keeping():
            self.folder.files.write(self._answer_file(round), lambda path: path.write_bytes(raw))

        # The device counts what travelled itself, as the server does for all clients.
        format = self.config.upload.format
        moved = traffic(reply.upload or {}, download, format)
        lines: list[Line] = []
        if finished:
            lines.append(last_download(self.name, round, download, format))
        for line in reply.metrics:
            lines.append(with_traffic(line, moved) if isinstance(line, TrainReport) else line)
        last = self.config.rounds if finished else round
        self.folder.commit(last, lines, [reply.timing], finished)
        self.folder.files.remove(self._answer_file(self.answered))
        self.answered = round
        if finished:
            self._summarize()

    def _summarize(self) -> None:
        write_summary(self.folder, self.config, self.method)

    def _held(self, part: str) -> dict[str, Tensor]:
        return self.folder.load(self._path(part)) if self.folder.holds(self._path(part)) else {}

    def _path(self, part: str) -> str:
        return f"clients/{self.name}/{part}"

    def _answer_file(self, round: int) -> str:
        return f".answer-{round:04d}"


def open_folder(path: Path, config: Config, base: Base, data: ClientData, after: int) -> RunFolder:
    """Return the run's folder on this device, made where it is new. after: the last round that the
    server had an answer of.

    Raises UserError, and Refused where the run is not the one that was begun here.
    """
    # A new folder would begin from nothing, which is wrong where the server has had answers.
    everyone = {config.clients[0].name: data}
    if not path.exists():
        if after:
            raise Refused(
                "lost",
                f"{path}: missing; the server has had answers of this device up to round {after}",
            )
        own = {"on_device_of": config.clients[0].name}  # only its server can go on with it
        return RunFolder.create(path, config, environment(base, everyone) | own)

    # With another config, text or base it would be another run under the same name.
    folder = RunFolder.open(path)
    if _told(folder.config()) != _told(config):
        raise Refused(
            "refused", f"{path}: the server now gives other settings than when the run began"
        )
    then = folder.environment()
    if then["data"] != describe(everyone):
        raise Refused(
            "not-ready", f"{path}: the text has changed since this run began; put it back"
        )
    if then["base_fingerprint"] != base.fingerprint:
        raise Refused("base", f"{path}: the base is another one than when the run began")
    return folder


def _told(config: Config) -> dict[str, Any]:
    """Return the settings that the server decides."""
    # How many specialists it has is the owner's to change from one start to the next.
    told = config_for(config, config.clients[0].name)
    told["clients"][0].pop("specialists", None)
    return told | {"base": told["base"] | {"name": ""}}
