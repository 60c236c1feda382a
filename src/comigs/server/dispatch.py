"""This module decides who is asked, who is waited for and for how long: one exchange over a network
on which devices come and go, real or simulated.

A client has answered (or failed), or its message is out, or it is busy with one of an earlier
exchange, or it is away. An exchange ends when nothing is out any more, at the latest at its
deadline, which counts from the first message. Whoever is away gets a while to come back. Until one
client can be asked, an exchange waits; where others could be asked instead, while nobody is online.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from comigs.runs.metrics import Note
from comigs.server.protocol import Report
from comigs.server.transport import GONE, Clock, Failure, RealClock, Transport
from comigs.server.wire import WireError
from comigs.text import brief

LIVES = 2  # deadlines that a message lives for; a still later answer comes when asked for again
SHOWN = 5  # names in a note
EVERY = 10.0  # seconds between notes that say nothing new
NO_NODE = "not invited any more"


class OfRound(Protocol):
    """Whatever answers a question says which round it is of."""

    @property
    def round(self) -> int:
        """The round, from 1."""


Answer = TypeVar("Answer", bound=OfRound)


@dataclass(frozen=True)
class Question(Generic[Answer]):
    """A question is what one client is asked. write(): the message. accept(what came, the
    message's size in bytes): the answer; raises WireError.
    """

    client: str
    round: int
    write: Callable[[], Any]
    accept: Callable[[Any, int], Answer]


@dataclass(frozen=True)
class Polling:
    """Polling has these seconds. deadline: for an exchange, from its first message. patience: for
    clients that are away to come back. look, seldom: between looks for answers, at first and after
    a while.
    """

    deadline: float
    patience: float = 30.0
    look: float = 0.2
    seldom: float = 1.0


@dataclass
class Gathered(Generic[Answer]):
    """This is what came. answers: to what was asked now. late: to what was asked before. absent:
    client -> why nothing came. asked: the clients to whom a message went out.
    """

    answers: dict[str, Answer] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    late: dict[str, Answer] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Out(Generic[Answer]):
    """A message is out. size: in bytes. started: when its node did, to notice a restart. ends: when
    the message is given up.
    """

    question: Question[Answer]
    size: int
    started: str
    ends: float


class Dispatcher(Generic[Answer]):
    """A dispatcher carries questions to clients. A message may stay out from one exchange to the
    next, one for each client.

    out: the messages whose answers may still come in, by their ids.
    """

    def __init__(
        self,
        transport: Transport,
        nodes: Mapping[str, int],
        polling: Polling,
        report: Report,
        clock: Clock | None = None,
    ) -> None:
        """Carry over `transport`. nodes: client -> its node; who has none is not waited for.

        clock: None is this machine's.
        """
        self._transport, self._nodes = transport, nodes
        self._polling, self._report = polling, report
        self._clock = clock or RealClock()
        self.out: dict[str, Out[Answer]] = {}

    def gather(
        self,
        questions: Mapping[str, Question[Answer]],
        others: bool = True,
        enough: int | None = None,
        replaceable: bool = False,
    ) -> Gathered[Answer]:
        """Ask, and wait for answers. Every client of `questions` is in the answers or in absent.

        others: also take in what clients that are not asked now answer to something earlier.
        enough: with so many answers the rest are not waited for longer than for who is away.
        replaceable: others can be asked, so one that is online is enough not to wait for these.
        """
        exchange = _Exchange(questions, self._polling, self._report, self._clock, enough)
        for client, question in questions.items():
            if client not in self._nodes:
                exchange.failed(question, NO_NODE)
        # What has come in is taken first: who has answered something earlier can be asked now.
        while True:
            ids = [m for m, o in self.out.items() if others or o.question.client in questions]
            self._collect(exchange, ids)
            online = self._transport.online(self._nodes_of(questions))
            if replaceable:
                anybody = online or self._transport.online(set(self._nodes.values()))
                exchange.note_online(bool(anybody))
            self._forget(online)
            self._push(exchange, online)
            out = {o.question.client: o.question.round for o in self.out.values()}
            if exchange.is_over(out):
                return exchange.result(out)
            exchange.tell(out)
            look = min(self._polling.seldom, max(self._polling.look, exchange.age() / 20))
            given_up = [o.ends for o in self.out.values()]
            self._clock.wait(look, min([exchange.changes(), *given_up]))

    def _nodes_of(self, questions: Mapping[str, Question[Answer]]) -> set[int]:
        clients = {*questions, *(out.question.client for out in self.out.values())}
        return {self._nodes[client] for client in clients if client in self._nodes}

    def _collect(self, exchange: _Exchange[Answer], messages: Sequence[str]) -> None:
        for message, content in self._transport.pull(messages).items():
            out = self.out.pop(message)
            if isinstance(content, Failure):
                exchange.failed(out.question, content.reason)
                continue
            try:
                exchange.answered(out.question, out.question.accept(content, out.size))
            except WireError as error:
                exchange.failed(out.question, brief(str(error)))  # it may name what came

    def _forget(self, online: Mapping[int, str]) -> None:
        """Drop messages that nobody will answer: too old, or taken by a node that has restarted
        since.
        """
        now = self._clock.now()
        for message, out in list(self.out.items()):
            node = self._nodes[out.question.client]
            if now >= out.ends or (node in online and online[node] != out.started):
                del self.out[message]

    def _push(self, exchange: _Exchange[Answer], online: Mapping[int, str]) -> None:
        busy = {out.question.client for out in self.out.values()}
        life = LIVES * self._polling.deadline
        for client, question in exchange.open().items():
            node = self._nodes[client]
            if client not in busy and node in online:
                written = question.write()
                if (message := self._transport.push(node, written, life)) is not None:
                    ends = self._clock.now() + life
                    self.out[message] = Out(question, len(written), online[node], ends)
                    exchange.asked(client)


class _Exchange(Generic[Answer]):
    """An exchange is known as far as it has come."""

    def __init__(
        self,
        questions: Mapping[str, Question[Answer]],
        polling: Polling,
        report: Report,
        clock: Clock,
        enough: int | None,
    ) -> None:
        self._questions, self._polling, self._report = questions, polling, report
        self._clock, self._enough = clock, enough
        self._came = Gathered[Answer]()
        self._began = clock.now()
        self._deadline: float | None = None
        self._waits = True  # for one client to ask, however long that takes
        self._back_by = dict.fromkeys(questions, self._began + polling.patience)
        self._told: tuple[object, ...] = ()
        self._told_at = 0.0

    def age(self) -> float:
        """Return the seconds since it began."""
        return self._clock.now() - self._began

    def open(self) -> dict[str, Question[Answer]]:
        """Return what is not answered yet, by client."""
        done = self._came.answers.keys() | self._came.absent.keys()
        return {name: question for name, question in self._questions.items() if name not in done}

    def _asks(self, question: Question[Answer]) -> bool:
        now = self._questions.get(question.client)
        return now is not None and now.round == question.round

    def note_online(self, anybody: bool) -> None:
        """Note whether anybody is online: until then nobody's while to come back begins."""
        self._waits = not anybody
        if not anybody:
            self._back_by = dict.fromkeys(self._back_by, self._clock.now() + self._polling.patience)

    def asked(self, client: str) -> None:
        """Note that a message has gone out, whose answer may come after the exchange."""
        self._came.asked.add(client)

    def answered(self, question: Question[Answer], answer: Answer) -> None:
        """Take an answer: to what was asked now, or to what was asked before, after which its
        client can be asked again.
        """
        if self._asks(question) and answer.round == question.round:
            self._came.answers[question.client] = answer
        else:
            self._came.late[question.client] = answer

    def failed(self, question: Question[Answer], reason: str) -> None:
        """Note that no answer will come; from who is gone, perhaps later."""
        if self._asks(question):
            if reason == GONE:
                self._back_by[question.client] = self._clock.now() + self._polling.patience
            else:
                self._came.absent[question.client] = reason

    def is_over(self, out: Mapping[str, int]) -> bool:
        """Return whether nobody is waited for any more. out: client -> round of its message."""
        now, open = self._clock.now(), self.open()
        waiting = [name for name, question in open.items() if out.get(name) == question.round]
        if waiting and self._deadline is None:
            self._deadline = now + self._polling.deadline
        if not open or (self._deadline is not None and now >= self._deadline):
            return True
        if self._enough is not None and len(self._came.answers) >= self._enough:
            return self.age() >= self._polling.patience
        away = [name for name in open if name not in out]
        may_come = any(now < self._back_by[name] for name in away)
        begun = self._deadline is not None or (not self._waits and len(away) == len(open))
        return begun and not waiting and not may_come

    def changes(self) -> float:
        """Return when the next moment comes that may end it without an answer."""
        moments = [self._back_by[name] for name in self.open()]
        if self._deadline is not None:
            moments.append(self._deadline)
        now = self._clock.now()
        return min((moment for moment in moments if moment > now), default=math.inf)

    def result(self, out: Mapping[str, int]) -> Gathered[Answer]:
        """Return what came, at its end, with a reason for each client that did not answer."""
        for name, question in self.open().items():
            reason = GONE
            if name in out and out[name] != question.round:
                reason = f"busy with round {out[name]}"
            elif name in out:
                reason = "no answer by the deadline"
            self._came.absent[name] = reason
        return self._came

    def tell(self, out: Mapping[str, int]) -> None:
        """Report how it stands, when that has changed or after a while."""
        missing, count = list(self.open()), len(self._questions)
        stuck = self._deadline is None
        state = (len(missing), stuck, *missing)
        if state == self._told and self._clock.now() - self._told_at < EVERY:
            return

        # A long list of names would say less than how many there are.
        names = ", ".join(missing[:SHOWN])
        if len(missing) > SHOWN:
            names += f" and {len(missing) - SHOWN} more"
        how = f"{count - len(missing)} of {count} in, waiting for {names}"
        if stuck:
            how = f"nobody can be asked yet, waiting for {names}"
        first = next(iter(self._questions.values()))
        message = f"round {first.round}: {how} ({self.age():.0f} s)"
        self._report(Note(message=message, say=stuck and state != self._told))
        self._told, self._told_at = state, self._clock.now()
