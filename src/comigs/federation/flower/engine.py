"""Rounds over Flower: what each client is asked, and what its answer must be to count."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from comigs.config import Config
from comigs.engines.upload_store import UploadStore
from comigs.federation.flower.dispatch import Dispatcher, Question
from comigs.federation.messages import (
    ANSWERS,
    Answered,
    Probed,
    Refusal,
    Request,
    config_for,
    our_version,
)
from comigs.methods.method import Download, Method, Upload
from comigs.runs.folder import RunFolder
from comigs.server import wire
from comigs.server.protocol import Answers, Reply, Task
from comigs.server.validation import expected_upload
from comigs.server.wire import WireError
from comigs.slots import Shapes

SEEN = "server/clients"  # path in the run: of each client, the last round it answered, and the last it did in time
ROOM = 1 << 21  # bytes of an answer beside its numbers
KEPT = 2  # downloads of a client that an upload may still be a step from


class Flower:
    """An engine whose clients are on machines of their own."""

    def __init__(
        self, config: Config, method: Method, folder: RunFolder, run: str, fingerprint: str,
        shapes: Mapping[str, Shapes], courier: Dispatcher[Reply | Probed],
    ) -> None:  # fmt: skip
        """run: the run's id, the same after a resume. fingerprint: of the base."""
        self.shapes = shapes
        self._config, self._method, self._folder, self._courier = config, method, folder, courier
        self._run, self._fingerprint = run, fingerprint
        self._spool, self._round = UploadStore(folder.scratch / "uploads"), 0
        self._sent: dict[str, dict[int, Download]] = defaultdict(dict)
        seen = folder.load(SEEN) if folder.holds(SEEN) else {}
        self._seen = {name: (int(rounds[0]), int(rounds[1])) for name, rounds in seen.items()}

    def exchange(self, tasks: Mapping[str, Task], downloads: Mapping[str, Download]) -> Answers:
        """One message to each client that can be reached, and what comes back by the deadline."""
        self._round, before = max(task.round for task in tasks.values()), self._round
        if self._round != before:
            self._spool.clear()
        came = self._courier.gather(
            {n: self._question(n, task, downloads.get(n, {})) for n, task in tasks.items()}
        )
        replies = _replies({name: came.answers[name] for name in tasks if name in came.answers})
        for name in replies:
            self._seen[name] = (self._round, self._round)
        self._folder.stage(
            SEEN, {n: torch.tensor(rounds) for n, rounds in self._seen.items()}, self._round
        )
        return Answers(replies, came.absent, _replies(came.late))

    def probe(self, uploads: Mapping[str, Upload], round: int) -> dict[str, dict[str, float]]:
        """reader -> author -> nats per token of the author's upload; of readers that answer.

        Uploads travel as downloads do, and without their authors' names.
        """
        questions = {reader: self._probe_question(reader, uploads, round) for reader in uploads}
        came = self._courier.gather(
            questions, others=False
        )  # late uploads wait for the next exchange
        probed = {
            reader: nats
            for reader in uploads
            if isinstance(nats := came.answers.get(reader), Probed)
        }
        return {
            reader: dict(zip(uploads, answer.nats, strict=True))
            for reader, answer in probed.items()
        }

    def _question(self, name: str, task: Task, download: Download) -> Question[Reply | Probed]:
        format = self._config.upload.format

        def write() -> bytes:
            if format == "int8":
                self._sent[name][task.round] = download
                for old in sorted(self._sent[name])[:-KEPT]:
                    del self._sent[name][old]
            return wire.pack(
                self._request("exchange", name, task), wire.encode_download(download, format)
            )

        return Question(
            name, task.round, write, lambda raw, size: self._reply(name, task.round, raw, size)
        )

    def _probe_question(
        self, name: str, uploads: Mapping[str, Upload], round: int
    ) -> Question[Reply | Probed]:
        def write() -> bytes:
            tensors: dict[str, Tensor] = {}
            for number, upload in enumerate(uploads.values()):
                encoded = wire.encode_download(upload, self._config.upload.format)
                tensors |= {f"{number}/{slot}": tensor for slot, tensor in encoded.items()}
            return wire.pack(
                self._request("probe", name, Task(round, False, (), ()), len(uploads)), tensors
            )

        def accept(raw: bytes, size: int) -> Probed:
            head, _ = self._opened(raw, name)
            if (
                not isinstance(head, Probed)
                or head.round != round
                or len(head.nats) != len(uploads)
            ):
                raise WireError("answered something else")
            return head

        return Question(name, round, write, accept)

    def _request(
        self, kind: Literal["exchange", "probe"], name: str, task: Task, probed: int = 0
    ) -> Request:
        after, since = self._seen.get(name, (0, 0))
        return Request(
            kind=kind, run=self._run, after=after, since=since, round=task.round, train=task.train,
            evaluate=task.evaluate, evaluate_base=task.evaluate_base, config=config_for(self._config, name),
            comigs=our_version(), base=self._fingerprint, probed=probed,
        )  # fmt: skip

    def _opened(self, raw: bytes, name: str) -> tuple[Answered | Probed, dict[str, Tensor]]:
        """Raises WireError where it is no answer of this run, or a refusal."""
        shared = [
            math.prod(dims) for slot, dims in self.shapes[name].items() if self._method.shares(slot)
        ]
        head, tensors = wire.unpack(raw, ANSWERS, 4 * sum(shared) + ROOM)
        if isinstance(head, Refusal):
            raise WireError(head.reason())
        if head.run != self._run:
            raise WireError("answered in another run")
        return head, tensors

    def _reply(self, name: str, round: int, raw: bytes, size: int) -> Reply:
        """An answer to an exchange of that round, or to an earlier one whose answer did not come
        in.
        """
        head, tensors = self._opened(raw, name)
        after, since = self._seen.get(name, (0, 0))
        if not isinstance(head, Answered) or not (
            head.round == round or after < head.round < round
        ):
            raise WireError("answered something else")
        self._seen[name] = (head.round, since)  # whatever is wrong with the rest: it is done there
        if head.trained != (head.round <= self._config.rounds):
            raise WireError("answered something else")
        upload = self._upload(name, head.round, tensors) if head.trained else None
        kept = upload if upload is None else self._spool.add(name, upload)
        timing = head.timing | {"received_bytes": size, "sent_bytes": len(raw)}
        return Reply(kept, head.metrics, timing, 1, head.round)

    def _upload(self, name: str, round: int, tensors: wire.Encoded) -> Upload | None:
        """The upload; None where it is a step from a download that is not here any more. Raises
        WireError.
        """
        format, sent = self._config.upload.format, self._sent[name]
        if format == "int8" and round not in sent:
            return None
        reference = wire.as_received(sent[round], format) if format == "int8" else {}
        return wire.decode(
            tensors, expected_upload(self._method, self.shapes[name], round), reference, format
        )


def _replies(came: Mapping[str, Reply | Probed]) -> dict[str, Reply]:
    return {name: answer for name, answer in came.items() if isinstance(answer, Reply)}
