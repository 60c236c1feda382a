"""A run on a device: an ordinary run folder with one client, and the last answer, to be repeated
when asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comigs.bases.load import Base
from comigs.client.client import Client
from comigs.client.state import ClientState
from comigs.config import Config
from comigs.data.prepare import ClientData
from comigs.errors import UserError
from comigs.federation.messages import Code, config_for
from comigs.files import write_whole, writing
from comigs.methods.method import Download, Method
from comigs.runs.environment import describe, environment
from comigs.runs.folder import RunFolder
from comigs.runs.metrics import Line, TrainReport
from comigs.runs.summary import write_summary
from comigs.server.communication import last_download, traffic, with_traffic
from comigs.server.protocol import Reply
from comigs.server.wire import plain
from comigs.slots import Slot


class Refused(Exception):
    """A request that is not answered. code: all that the server learns. line: what the device's
    owner reads.
    """

    def __init__(self, code: Code, line: str) -> None:
        super().__init__(line)
        self.code, self.line = code, line


@contextmanager
def refusing(code: Code) -> Iterator[None]:
    """What is wrong with text, disk or training here is told to the owner in full, to the server as
    a code.
    """
    try:
        yield
    except UserError as error:
        raise Refused(code, str(error)) from None


class DeviceRun:
    """What this device has of a run. answered: the last round that it answered, 0 before the
    first.
    """

    def __init__(self, folder: RunFolder, config: Config, method: Method) -> None:
        last = folder.rewind()
        self.folder, self.config, self.method = folder, config, method
        (self.name,) = (client.name for client in config.clients)
        self.answered = (
            last.round + last.finished
        )  # the last exchange comes one round after the last

    def state(self) -> ClientState | None:
        """What the client goes on from; None: from its start."""
        if not self.folder.holds(self._path("experts")):
            return None
        return {part: self.folder.load(self._path(part)) for part in ("experts", "optimizer")}

    def residual(self) -> dict[Slot, Tensor]:
        """What rounding left over of its uploads so far (wire.encode)."""
        return {Slot.parse(name): tensor for name, tensor in self._held("residual").items()}

    def unseen(self, download: Download, since: int) -> Download:
        """A download without the updates that were added here already.

        since: the last round that the server knows to have reached this client. If that is not its
        last answer, the download begins with what came with that answer's request: the first ranks
        of every update.
        """
        merged = {} if since >= self.answered else self._held("merged")
        rest: dict[Slot, Tensor] = {}
        for slot, tensor in download.items():
            seen = int(merged[str(slot)]) if str(slot) in merged else 0
            side = 0 if slot.matrix == "A" else 1
            if seen > tensor.shape[side]:
                raise Refused(
                    "lost", f"the server's updates end before those of round {self.answered}"
                )
            if seen < tensor.shape[side]:
                rest[slot] = tensor.narrow(side, seen, tensor.shape[side] - seen)
        return rest

    def is_answered(self, round: int, after: int) -> bool:
        """The server lacks the last answer, and is to get it again. Raises Refused where there is
        no way on from here.

        round: it asks for. after: the last round that it has an answer of.
        """
        if round < self.answered:
            raise Refused(
                "over",
                f"{self.folder.path}: asked for round {round}, but has answered round {self.answered}",
            )
        if self.answered < after:
            raise Refused(
                "lost",
                f"{self.folder.path}: ends with round {self.answered}, but round {after} was answered from here",
            )
        return round == self.answered or self.answered > after

    def said(self) -> bytes:
        """The last answer, as it was sent."""
        if self.answered > self.config.rounds:
            self._summarize()
        try:
            return self._answer_file(self.answered).read_bytes()
        except OSError:
            raise Refused(
                "lost",
                f"{self._answer_file(self.answered)}: missing; the answer cannot be repeated",
            ) from None

    def keep(
        self,
        round: int,
        raw: bytes,
        reply: Reply,
        client: Client,
        residual: Mapping[Slot, Tensor],
        download: Download,
    ) -> None:
        """Make this answer what the run is continued from. Raises UserError where the disk
        refuses.
        """
        state = client.state()
        parts: dict[str, Mapping[str, Tensor]] = {"personal": state["experts"]}
        if reply.upload is not None:
            parts = {**state, **({"residual": plain(residual)} if residual else {})}
            if self.method.merges:
                parts["merged"] = {
                    str(slot): _rank(slot, t)
                    for slot, t in download.items()
                    if slot.role == "update"
                }
        for part, tensors in parts.items():
            self.folder.stage(self._path(part), tensors, round)
        with writing(self.folder.path, "make room or allow writing; the server will ask again"):
            write_whole(self._answer_file(round), lambda path: path.write_bytes(raw))
        format, finished = self.config.upload.format, reply.upload is None
        moved = traffic(reply.upload or {}, download, format)
        lines: list[Line] = []
        if finished:
            lines.append(last_download(self.name, round, download, format))
        for line in reply.metrics:
            lines.append(with_traffic(line, moved) if isinstance(line, TrainReport) else line)
        self.folder.commit(
            self.config.rounds if finished else round, lines, [reply.timing], finished
        )
        self._answer_file(self.answered).unlink(missing_ok=True)
        self.answered = round
        if finished:
            self._summarize()

    def _summarize(self) -> None:
        write_summary(self.folder, self.config, self.method)

    def _held(self, part: str) -> dict[str, Tensor]:
        return self.folder.load(self._path(part)) if self.folder.holds(self._path(part)) else {}

    def _path(self, part: str) -> str:
        return f"clients/{self.name}/{part}"

    def _answer_file(self, round: int) -> Path:
        return self.folder.path / f".answer-{round:04d}"


def open_folder(path: Path, config: Config, base: Base, data: ClientData, after: int) -> RunFolder:
    """The run's folder on this device, made where it is new. after: the last round that the server
    had an answer of.

    Raises UserError, and Refused where the run is not the one that was begun here.
    """
    everyone = {config.clients[0].name: data}
    if not path.exists():
        if after:
            raise Refused(
                "lost",
                f"{path}: missing; the server has had answers of this device up to round {after}",
            )
        own = {"on_device_of": config.clients[0].name}  # only its server can go on with it
        return RunFolder.create(path, config, environment(base, everyone) | own)
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
    """The settings that the server decides."""
    told = config_for(config, config.clients[0].name)
    return told | {"base": told["base"] | {"name": ""}}


def _rank(slot: Slot, tensor: Tensor) -> Tensor:
    return torch.tensor(tensor.shape[0 if slot.matrix == "A" else 1])
