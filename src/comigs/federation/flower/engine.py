"""This module is the engine over Flower: what each client is asked, and what its answer must be to
count.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from comigs.config import Config
from comigs.engines.upload_store import UploadStore
from comigs.federation.messages import (
    ANSWERS,
    Answer,
    Answered,
    Kind,
    Probed,
    Refusal,
    Request,
    config_for,
    our_version,
)
from comigs.federation.sum_messages import SumRequest
from comigs.methods.method import Download, Method, Upload
from comigs.runs.folder import RunFolder
from comigs.server import wire
from comigs.server.dispatch import Dispatcher, Question
from comigs.server.protocol import Answers, Reply, Task
from comigs.server.validation import expected_upload, most_figures
from comigs.server.wire import WireError
from comigs.slots import Shapes

# Path in the run: of each client, the last round it answered, and the last it answered in time.
SEEN = "server/clients"
ROOM = 1 << 21  # bytes of an answer beside its numbers and its figures
FIGURE = 32  # bytes of a figure in a head, as text
KEPT = 2  # downloads of a client that an upload may still be a step from


@dataclass(frozen=True)
class FederatedRun:
    """A federated run is one run as its server knows it.

    id: the same after a resume. fingerprint: of the base. shapes: of every tensor that a client
    has, by client.
    """

    id: str
    config: Config
    method: Method
    fingerprint: str
    shapes: Mapping[str, Shapes]


class Flower:
    """This engine's clients are on machines of their own."""

    def __init__(self, run: FederatedRun, folder: RunFolder, dispatcher: Dispatcher[Any]) -> None:
        """Carry a run's exchanges; what it must know after a resume is in the run folder."""
        self.shapes = run.shapes
        self._run, self._config, self._method = run, run.config, run.method
        self._folder, self._dispatcher = folder, dispatcher
        self._store, self._round = UploadStore(folder.scratch / "uploads"), 0
        self._sent: dict[str, dict[int, Download]] = defaultdict(dict)
        seen = folder.load(SEEN) if folder.holds(SEEN) else {}
        self._keys: dict[str, str] = {}  # of devices that take part in sums, since this start
        self.opening = 0  # the last round of which devices were asked to open a sum
        self._seen = {name: (int(rounds[0]), int(rounds[1])) for name, rounds in seen.items()}

    def exchange(self, tasks: Mapping[str, Task], downloads: Mapping[str, Download]) -> Answers:
        """Send a message to each client that can be reached; return what comes back by the
        deadline.
        """
        # A round that is asked again needs the uploads that have come in already.
        self._round, before = max(task.round for task in tasks.values()), self._round
        if self._round != before:
            self._store.clear()
        if self._is_summed():
            answers = self._summed(tasks, downloads)
        else:
            questions = {}
            for name, task in tasks.items():
                questions[name] = self._question(name, task, downloads.get(name, {}))
            # At the end everybody is asked who can be.
            is_end = self._round > self._config.rounds
            replaceable = not (is_end or self._config.asks_all)
            came = self._dispatcher.gather(questions, replaceable=replaceable)
            replies, late = replies_of(came.answers, tasks), replies_of(came.late)
            answers = Answers(replies, came.absent, late, pending=came.asked)

        for name in answers.replies:
            self._seen[name] = (self._round, self._round)
        seen = {name: torch.tensor(rounds) for name, rounds in self._seen.items()}
        self._folder.stage(SEEN, seen, self._round)
        return answers

    def _is_summed(self) -> bool:
        """Return whether there are uploads in this round of which the server learns the sum."""
        summed = self._config.privacy.secure_aggregation and self._round <= self._config.rounds
        of_any = next(iter(self.shapes.values()))
        return summed and bool(expected_upload(self._method, of_any, self._round))

    def _summed(self, tasks: Mapping[str, Task], downloads: Mapping[str, Download]) -> Answers:
        # It imports Flower's primitives, which other runs do without.
        from comigs.federation.flower.round_sum import RoundSum

        return RoundSum(self._run, self, self._dispatcher, self._keys).exchange(tasks, downloads)

    def note_answered(self, name: str, answered: int) -> None:
        """Take note of the last round that a device says it has answered.

        An answer of an earlier round is of no use any more where uploads are summed.
        """
        after, since = self._seen.get(name, (0, 0))
        self._seen[name] = (max(after, min(answered, self._round - 1)), since)

    def probe(self, uploads: Mapping[str, Upload], round: int) -> dict[str, dict[str, float]]:
        """Return reader -> author -> nats per token of the author's upload, of readers that answer.

        Uploads travel as downloads do, and without their authors' names.
        """
        questions = {reader: self._probe_question(reader, uploads, round) for reader in uploads}
        # Late uploads wait for the next exchange.
        replaceable = not self._config.asks_all
        came = self._dispatcher.gather(questions, others=False, replaceable=replaceable)
        nats = {}
        for reader in uploads:
            answer = came.answers.get(reader)
            if isinstance(answer, Probed):
                nats[reader] = dict(zip(uploads, answer.nats, strict=True))
        return nats

    def _question(self, name: str, task: Task, download: Download) -> Question[Reply | Probed]:
        format = self._config.upload.format

        # In int8 an upload is a step from what was sent, which has to be here when it comes.
        def write() -> bytes:
            if format == "int8":
                self._sent[name][task.round] = download
                for old in sorted(self._sent[name])[:-KEPT]:
                    del self._sent[name][old]
            head = self.request("exchange", name, task)
            return wire.pack(head, wire.encode_download(download, format))

        def accept(raw: bytes, size: int) -> Reply:
            return self._reply(name, task.round, raw, size)

        return Question(name, task.round, write, accept)

    def _probe_question(
        self, name: str, uploads: Mapping[str, Upload], round: int
    ) -> Question[Reply | Probed]:
        # Only a reader that is reached has its message written, for that is all uploads at once.
        def write() -> bytes:
            tensors: dict[str, Tensor] = {}
            for number, upload in enumerate(uploads.values()):
                encoded = wire.encode_download(upload, self._config.upload.format)
                tensors |= {f"{number}/{slot}": tensor for slot, tensor in encoded.items()}
            task = Task(round, False, (), ())
            return wire.pack(self.request("probe", name, task, len(uploads)), tensors)

        def accept(raw: bytes, size: int) -> Probed:
            head, _ = self.opened(raw, name)
            fits = isinstance(head, Probed) and len(head.nats) == len(uploads)
            if not isinstance(head, Probed) or not fits or head.round != round:
                raise WireError("answered something else")
            return head

        return Question(name, round, write, accept)

    def request(
        self,
        kind: Kind,
        name: str,
        task: Task,
        probed: int = 0,
        of_sum: SumRequest | None = None,
    ) -> Request:
        """Return the head of a message to a client."""
        after, since = self._seen.get(name, (0, 0))
        # A device is told all that it needs with each request, for it may have missed any other.
        return Request(
            kind=kind,
            run=self._run.id,
            after=after,
            since=since,
            round=task.round,
            train=task.train,
            evaluate=task.evaluate,
            evaluate_base=task.evaluate_base,
            prior=task.prior,
            config=config_for(self._config, name),
            comigs=our_version(),
            base=self._run.fingerprint,
            probed=probed,
            sum=of_sum,
        )

    def opened(self, raw: bytes, name: str) -> tuple[Answer, dict[str, Tensor]]:
        """Return an answer's head and tensors. Raises WireError where it is no answer of this run,
        or a refusal.
        """
        shapes = self.shapes[name]
        header = wire.MOST_HEADER + FIGURE * most_figures(self._config, shapes)
        most = most_of_answer(self._config, self._method, shapes)
        head, tensors = wire.unpack(raw, ANSWERS, most, header)
        if isinstance(head, Refusal):
            raise WireError(head.reason())
        if head.run != self._run.id:
            raise WireError("answered in another run")
        return head, tensors

    def _reply(self, name: str, round: int, raw: bytes, size: int) -> Reply:
        """Return the reply to an exchange of that round, or to an earlier one whose answer did not
        come in. Raises WireError.
        """
        head, tensors = self.opened(raw, name)
        reply = self.reply(name, round, head, (size, len(raw)))
        if reply.round > self._config.rounds:
            return reply
        upload = self._upload(name, reply.round, tensors)
        kept = upload if upload is None else self._store.add(name, upload)
        return replace(reply, upload=kept)

    def reply(self, name: str, round: int, head: Answer, sizes: tuple[int, int]) -> Reply:
        """Return what an answer's head says, without its upload. Raises WireError.

        round: that was asked for. sizes: bytes of the request and of the answer.
        """
        after, since = self._seen.get(name, (0, 0))
        if not isinstance(head, Answered) or not (
            head.round == round or after < head.round < round
        ):
            raise WireError("answered something else")
        # Whatever is wrong with all else: this round is done there, and is not asked for again.
        self._seen[name] = (head.round, since)
        if head.trained != (head.round <= self._config.rounds):
            raise WireError("answered something else")
        timing = head.timing | {"received_bytes": sizes[0], "sent_bytes": sizes[1]}
        return Reply(None, head.metrics, timing, 1, head.round)

    def _upload(self, name: str, round: int, tensors: wire.Encoded) -> Upload | None:
        """Return the upload, or None where it is a step from a download that is not here any more.
        Raises WireError.
        """
        format, sent = self._config.upload.format, self._sent[name]
        if format == "int8" and round not in sent:
            return None
        reference = wire.as_received(sent[round], format) if format == "int8" else {}
        expected = expected_upload(self._method, self.shapes[name], round)
        return wire.decode(tensors, expected, reference, format)


def most_of_answer(config: Config, method: Method, shapes: Shapes) -> int:
    """Return how many bytes the answer of a client may have that has tensors of these shapes."""
    shared = [math.prod(dims) for slot, dims in shapes.items() if method.shares(slot)]
    return 4 * sum(shared) + ROOM + FIGURE * most_figures(config, shapes)


def replies_of(came: Mapping[str, object], order: Iterable[str] | None = None) -> dict[str, Reply]:
    """Return the replies among answers, in the order of names where one is given."""
    replies = {name: answer for name, answer in came.items() if isinstance(answer, Reply)}
    return {name: replies[name] for name in order or replies if name in replies}
