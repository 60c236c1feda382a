"""What comes in of one round: which uploads count, who is absent and why, who is left out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from comigs.config import Config
from comigs.methods.method import Download, Memory, Method, Upload
from comigs.privacy.budget import SPENT
from comigs.runs.metrics import Absent, Line, Timing, TrainReport, Warned
from comigs.server.communication import traffic_by_client, with_traffic
from comigs.server.participation import (
    budget_spent,
    failures,
    has_trained,
    late_line,
    left_out,
    left_out_line,
    participants,
)
from comigs.server.pending import discounted
from comigs.server.private_mean import sampled_clients
from comigs.server.protocol import Answers, Reply, Task
from comigs.server.validation import (
    Start,
    check_lines,
    check_upload,
    expected_upload,
    most_figures,
    read_reply,
    step_length,
    too_long,
)
from comigs.slots import Shapes

NO_ANSWER = "no answer"
NEWER = "it sent a newer one"
KEPT = 4  # downloads of a client that was asked so often and never answered


@dataclass
class ServerState:
    """The server goes from one round to the next with this.

    shapes: of every tensor that a client has, by client. start: of shared tensors, before any
    training. history: the lines of metrics.jsonl. downloads: what is delivered to each client with
    the next exchange. memory: the method's own. started: client -> round -> the download of a
    request whose answer may still come, kept where late uploads count.
    """

    config: Config
    method: Method
    shapes: Mapping[str, Shapes]
    start: Start
    history: list[Line]
    downloads: dict[str, Download] = field(default_factory=dict)
    memory: Memory = field(default_factory=dict)
    started: dict[str, dict[int, Download]] = field(default_factory=dict)


class RoundCollector:
    """One round on the server, from whom to ask to what to merge.

    uploads: what counts, in the config's order. absent: client -> why nothing usable came. reached:
    who has the download. out: who is left out, with `spent`, who has no privacy left; warnings: the
    lines that say so, of this round.
    """

    def __init__(self, server: ServerState, round: int) -> None:
        self.server, self.config, self.round = server, server.config, round
        self.downloads = server.downloads  # what is delivered in this round
        self.private = server.config.privacy.by_document
        # Whatever a client says, there is no budget where none is kept.
        self.spent = budget_spent(server.history) if self.private else set[str]()
        self.failed, self.out = failures(server.history), left_out(server.history) | self.spent
        # A sample is drawn once for a round, as nobody can draw it again.
        self._sample: list[str] | None = None
        if server.config.privacy.by_client:
            self._sample = sampled_clients(server.config, round)
        self.uploads: dict[str, Upload] = {}
        self.absent: dict[str, str] = {}
        self.reached: set[str] = set()
        self.warnings: list[Warned] = []
        self._tasks: dict[str, Task] = {}
        self._replies: dict[str, Reply] = {}
        self._late: dict[str, tuple[Reply, Upload]] = {}  # with what it counts for in this round
        self._too_late: list[Absent] = []
        self._of_engine: list[Line] = []
        self._expected: dict[tuple[int, int], Shapes] = {}  # by round and kind of client

    def to_ask(self) -> list[str]:
        """Return the clients of this round whose answer is missing; of a sum, all."""
        asked = participants(self.config, self.round, self.out)
        if self._sample is not None:
            asked = [name for name in self._sample if name not in self.out]
        # A sum that is asked for again is another one, of all.
        if self.config.privacy.secure_aggregation:
            return asked
        return [name for name in asked if name not in self._replies]

    def take(self, tasks: Mapping[str, Task], answers: Answers) -> None:
        """Sort what an exchange brought, check it, and leave out who failed too often."""
        self._of_engine += answers.lines
        # An answer to the first asking of this round may come in with the second.
        self._tasks |= tasks
        late = dict(answers.late)
        came = {
            name: late.pop(name)
            for name, reply in answers.late.items()
            if name in self._tasks and reply.round == self.round
        } | answers.replies
        self.reached |= came.keys()
        if self.config.privacy.secure_aggregation:
            self._replies = {}  # of a sum that did not do
        self._replies |= came

        # Of what a client sent for several rounds, the newest counts.
        for name in [name for name in self._late if name in came]:
            self._drop(name, self._late.pop(name)[0], NEWER)
        for name, reply in late.items():
            self._take_late(name, reply)
        self._remember(tasks, answers, came)

        # Whoever gives nothing usable time and again is not waited for any more. Whoever is slow
        # has not failed where its late upload counts.
        failed = {
            name: answers.absent.get(name, NO_ANSWER) for name in tasks if name not in came
        } | self._check()
        absent = self.absent | failed
        self.absent = {name: why for name, why in absent.items() if name not in self._replies}
        # Who does not count for want of others has not failed, unless nobody else has: asking ends.
        to_blame = failed.keys() - answers.blameless or failed.keys()
        for name, why in failed.items():
            if name in self._late or name not in to_blame:
                continue
            if why == SPENT and self.private:
                self.spent.add(name)
                self.out.add(name)
                continue
            self.failed[name] += 1
            if self.failed[name] >= self.config.participation.max_failures:
                self.out.add(name)
                self.warnings.append(left_out_line(self.round, name, self.failed[name], why))

    def _remember(
        self, tasks: Mapping[str, Task], answers: Answers, came: Mapping[str, Reply]
    ) -> None:
        """Keep which download a late upload will have started from, where one can still come."""
        if self.config.participation.late != "discount":
            return
        started = self.server.started
        for name in tasks:
            if answers.pending is None or name in answers.pending:
                started.setdefault(name, {})[self.round] = self.downloads.get(name, {})

        # A client answers one round after the other, and one that is left out is not heard.
        done = {name: reply.round for name, reply in answers.late.items()}
        done |= dict.fromkeys([*came, *self.out], self.round)
        for name, rounds in list(started.items()):
            left = sorted(round for round in rounds if round > done.get(name, 0))[-KEPT:]
            started[name] = {round: rounds[round] for round in left}
            if not left:
                del started[name]

    def _take_late(self, name: str, reply: Reply) -> None:
        """Make of a late upload what it counts for in this round, or a line that it is dropped."""
        # A round that was asked again can be answered twice.
        if has_trained(self.server.history, name, reply.round):
            return
        settings = self.config.participation
        if settings.late == "drop" or name in self.out:
            self._drop(name, reply, "dropped")
        elif name in self._replies:
            self._drop(name, reply, NEWER)
        elif fault := self._fault(name, reply, None):
            self._drop(name, reply, fault)
        else:
            # A part of an upload is of no use: every slot of this round's uploads must be in it.
            counts = discounted(
                reply.upload or {},
                self.server.started.get(name, {}).get(reply.round),
                self.downloads.get(name),
                settings.late_discount,
                self._expect(name, self.round),
            )
            if counts:
                self._late[name] = reply, counts
            else:
                self._drop(name, reply, "it does not fit this round")

    def _drop(self, name: str, late: Reply, why: str) -> None:
        self._too_late.append(late_line(late.round, name, self.round, why))

    def _check(self) -> dict[str, str]:
        """Check which uploads count; return client -> why not, of the answers that are refused."""
        refused: dict[str, str] = {}
        uploads = {name: counts for name, (_, counts) in self._late.items()}
        for name, reply in self._replies.items():
            if fault := self._fault(name, reply, self._tasks[name]):
                refused[name] = fault
            elif reply.upload is not None:
                uploads[name] = reply.upload

        # How long a step may be depends on those of the others, so it is judged when all are here;
        # not so where noise is made for sums in which nobody's part depends on who else is there.
        limits = self.config.upload
        if self.config.privacy.by_client:
            limits = limits.model_copy(update={"max_norm_ratio": math.inf})
        lengths = {
            name: step_length(upload, self.downloads.get(name, {}), self.server.start)
            for name, upload in uploads.items()
        }
        for name, why in too_long(lengths, limits).items():
            del uploads[name]
            if name in self._replies:
                refused[name] = why
            else:
                self._drop(name, self._late.pop(name)[0], why)
        for name in refused:
            del self._replies[name]
        names = self.config.names
        self.uploads = {name: uploads[name] for name in names if name in uploads}
        return refused

    def _fault(self, name: str, reply: Reply, task: Task | None) -> str | None:
        most = most_figures(self.config, self.server.shapes[name])
        fault = check_lines(reply, name, task, private=self.private, most=most)
        if fault is None and reply.upload is None:
            return None if self.server.method.centralized else "no upload"
        return fault or check_upload(reply.upload or {}, self._expect(name, reply.round))

    def _expect(self, name: str, round: int) -> Shapes:
        shapes = self.server.shapes[name]
        kind = round, id(shapes)
        if kind not in self._expected:
            self._expected[kind] = expected_upload(self.server.method, shapes, round)
        return self._expected[kind]

    def _counted(self) -> dict[str, Reply]:
        counted = {name: reply for name, (reply, _) in self._late.items()} | self._replies
        names = self.config.names
        return {name: counted[name] for name in names if name in counted}

    def weights(self) -> dict[str, float]:
        """Return how much each sender counts where a method weighs clients.

        It is what the config says, or else the number of the client's train tokens.
        """
        given = {client.name: client.weight for client in self.config.clients}
        replies = self._counted()
        return {name: given[name] or replies[name].train_tokens for name in self.uploads}

    def lines(self) -> list[Line]:
        """Return the lines of the clients with what travelled, and those of who is absent."""
        # What travelled is known to the server alone, and told together with the training.
        moved = traffic_by_client(
            self.uploads,
            self.downloads,
            self.config.upload.format,
            self.server.method.reads_peers,
        )
        lines: list[Line] = [*self._of_engine, *self._too_late]
        for name, reply in self._counted().items():
            for line in read_reply(reply, self.private)[0]:
                if isinstance(line, TrainReport):
                    lines.append(with_traffic(line, moved[name]))
                else:
                    lines.append(line)
        for name, why in self.absent.items():
            lines.append(Absent(round=self.round, client=name, reason=why))
        return lines

    def timings(self) -> list[Timing]:
        """Return the lines of timings.jsonl of the answers that count."""
        return [read_reply(reply, self.private)[1] for reply in self._counted().values()]

    def asked(self) -> list[str] | None:
        """Return the clients that were asked in this round, None where all were."""
        asked = [client.name for client in self.config.clients if client.name in self._tasks]
        return asked if len(asked) < len(self.config.clients) else None
