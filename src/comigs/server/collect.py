"""What comes in of one round: which answers count, who is absent and why, who is left out from now
on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from comigs.config import Config
from comigs.methods.method import Download, Method, Upload
from comigs.server.communication import traffics
from comigs.server.participation import (
    Line,
    absent_line,
    failures,
    has_trained,
    late_line,
    left_out,
    left_out_line,
    participants,
)
from comigs.server.pending import discounted
from comigs.server.protocol import Answers, Reply, Task
from comigs.server.validation import (
    Start,
    check_lines,
    check_upload,
    expected_upload,
    step_length,
    too_long,
)
from comigs.slots import Shapes

NO_ANSWER = "no answer"
NEWER = "it sent a newer one"
Started = dict[
    str, dict[int, Download]
]  # client -> round -> the download of a request that it has not answered yet


class RoundCollector:
    """One round on the server, from whom to ask to what to merge.

    uploads: what counts, in the config's order. absent: client -> why nothing usable came. reached:
    who has the download. out: who is left out; warnings: the lines that say so, of this round.
    """

    def __init__(
        self, config: Config, method: Method, shapes: Mapping[str, Shapes], start: Start, started: Started,
        history: Sequence[Line], downloads: Mapping[str, Download], round: int,
    ) -> None:  # fmt: skip
        """start: of shared tensors, before any training. downloads: what is delivered in this
        round. started: kept up to date where late uploads count."""
        self.config, self.method, self.shapes, self.start = config, method, shapes, start
        self.started, self.downloads, self.round = started, downloads, round
        self.history, self.failed, self.out = history, failures(history), left_out(history)
        self.uploads: dict[str, Upload] = {}
        self.absent: dict[str, str] = {}
        self.reached: set[str] = set()
        self.warnings: list[dict[str, Any]] = []
        self._tasks: dict[str, Task] = {}
        self._replies: dict[str, Reply] = {}
        self._late: dict[
            str, tuple[Reply, Upload]
        ] = {}  # with what the upload counts for in this round
        self._too_late: list[dict[str, Any]] = []
        self._expected: dict[tuple[int, int], Shapes] = {}  # by round and kind of client

    def to_ask(self) -> list[str]:
        """The clients of this round whose answer is missing."""
        return [
            name
            for name in participants(self.config, self.round, self.out)
            if name not in self._replies
        ]

    def take(self, tasks: Mapping[str, Task], answers: Answers) -> None:
        """Sort what an exchange brought, check it, and leave out who failed too often."""
        self._tasks |= tasks
        again = {
            n: r for n, r in answers.late.items() if n in self._tasks and r.round == self.round
        }  # to a first asking
        came = again | answers.replies
        self.reached |= came.keys()
        self._replies |= came
        for name in came.keys() & self._late.keys():
            self._drop(name, self._late.pop(name)[0], NEWER)
        for name, reply in answers.late.items():
            if name not in again:
                self._take_late(name, reply)
        if self.config.participation.late == "discount":
            self.started |= {
                n: {**self.started.get(n, {}), self.round: self.downloads.get(n, {})} for n in tasks
            }
            for name in came:
                self.started.pop(name, None)
        failed = {
            name: answers.absent.get(name, NO_ANSWER) for name in tasks if name not in came
        } | self._check()
        self.absent = {
            n: why for n, why in (self.absent | failed).items() if n not in self._replies
        }
        for name, why in failed.items():
            if name in self._late:
                continue  # it is slow, and what it did counts
            self.failed[name] += 1
            if self.failed[name] >= self.config.participation.max_failures:
                self.out.add(name)
                self.warnings.append(left_out_line(self.round, name, self.failed[name], why))

    def _take_late(self, name: str, reply: Reply) -> None:
        """Make of a late upload what it counts for in this round, or a line that it is dropped."""
        p = self.config.participation
        if has_trained(self.history, name, reply.round):
            return  # a round that was asked again can be answered twice
        if p.late == "drop" or name in self.out:
            self._drop(name, reply, "dropped")
        elif name in self._replies:
            self._drop(name, reply, NEWER)
        elif fault := self._fault(name, reply, None):
            self._drop(name, reply, fault)
        else:
            started, now = self.started.get(name, {}).get(reply.round), self.downloads.get(name)
            expected = self._expect(name, self.round)
            if counts := discounted(reply.upload or {}, started, now, p.late_discount, expected):
                self._late[name] = reply, counts
            else:
                self._drop(name, reply, "it does not fit this round")

    def _drop(self, name: str, late: Reply, why: str) -> None:
        self._too_late.append(late_line(late.round, name, self.round, why))

    def _check(self) -> dict[str, str]:
        """Settle what counts. Returns client -> why not, of the answers that are refused."""
        bad = {
            name: why
            for name, reply in self._replies.items()
            if (why := self._fault(name, reply, self._tasks[name]))
        }
        uploads = {
            name: reply.upload for name, reply in self._replies.items() if reply.upload is not None
        }
        uploads = {name: counts for name, (_, counts) in self._late.items()} | uploads
        lengths = {
            n: step_length(u, self.downloads.get(n, {}), self.start)
            for n, u in uploads.items()
            if n not in bad
        }
        bad |= too_long(lengths, self.config.upload)
        for name in bad.keys() - self._replies.keys():
            self._drop(name, self._late.pop(name)[0], bad[name])
        refused = {name: why for name, why in bad.items() if self._replies.pop(name, None)}
        self.uploads = {
            c.name: uploads[c.name]
            for c in self.config.clients
            if c.name in lengths and c.name not in bad
        }
        return refused

    def _fault(self, name: str, reply: Reply, task: Task | None) -> str | None:
        fault = check_lines(reply, name, task)
        if fault is None and reply.upload is None:
            return None if self.method.centralized else "no upload"
        return fault or check_upload(reply.upload or {}, self._expect(name, reply.round))

    def _expect(self, name: str, round: int) -> Shapes:
        shapes = self.shapes[name]
        if (round, id(shapes)) not in self._expected:
            self._expected[round, id(shapes)] = expected_upload(self.method, shapes, round)
        return self._expected[round, id(shapes)]

    def _counted(self) -> dict[str, Reply]:
        counted = {name: reply for name, (reply, _) in self._late.items()} | self._replies
        return {c.name: counted[c.name] for c in self.config.clients if c.name in counted}

    def weights(self) -> dict[str, float]:
        """How much each sender counts where a method weighs clients: what the config says, else its
        train tokens.
        """
        given, replies = {c.name: c.weight for c in self.config.clients}, self._counted()
        return {name: given[name] or replies[name].train_tokens for name in self.uploads}

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of the clients, and those of who is absent."""
        format = self.config.upload.format
        moved = traffics(self.uploads, self.downloads, format, self.method.reads_peers)
        lines = [
            line | moved[name] if line["kind"] == "train" else line
            for name, reply in self._counted().items()
            for line in reply.metrics
        ]
        return (
            self._too_late
            + lines
            + [absent_line(self.round, name, why) for name, why in self.absent.items()]
        )

    def timings(self) -> list[dict[str, Any]]:
        """The lines of timings.jsonl of the answers that count."""
        return [reply.timing for reply in self._counted().values()]

    def whom(self) -> dict[str, list[str]]:
        """{"asked": clients}, or nothing where all were asked."""
        asked = [c.name for c in self.config.clients if c.name in self._tasks]
        return {"asked": asked} if len(asked) < len(self.config.clients) else {}
