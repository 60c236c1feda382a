"""This module is a network of simulated devices: a transport for a dispatcher, and its clock.

Clients really work, all that were asked at a moment together; then it is known what they have
trained and what travels, and so when each answer is in. The clock goes from one such moment to the
next. What is lost on the way is undone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from comigs.engines.conditions.weather import Link, Weather
from comigs.errors import UserError
from comigs.methods.method import Download
from comigs.privacy.budget import SPENT
from comigs.runs.simulated import Attempt
from comigs.server.protocol import Reply, Task
from comigs.server.transport import GONE, Failure

DROPPED = "dropped out"


@dataclass(frozen=True)
class Message:
    """A message asks one client for one exchange. size: the bytes of its numbers."""

    client: str
    task: Task
    download: Download
    size: int

    def __len__(self) -> int:
        return self.size


@dataclass(frozen=True)
class Work:
    """A client has done this: its reply, the tokens that it trained on, and all its work in tokens
    that take as long to train on. uploaded_bytes: of the upload's numbers.
    """

    reply: Reply
    tokens: int
    effort: float
    uploaded_bytes: int


@dataclass(frozen=True)
class Answer:
    """An answer is ready on its device from a moment on."""

    reply: Reply
    uploaded_bytes: int
    ready: float


@dataclass(frozen=True)
class Trip:
    """A trip is a message on its way. known: when the server hears what has come of it.

    answer: None where it is lost, and why. Of an upload that is lost the device keeps the answer.
    """

    id: str
    client: str
    known: float
    answer: Answer | None
    lost: str = ""


@dataclass(frozen=True)
class Loss:
    """A loss is the moment at which a client is lost on its way, if ever, and why."""

    at: float
    why: str


@dataclass(frozen=True)
class Done:
    """An attempt has come to this: tokens that were trained on, bytes that travelled, and the round
    of the answer that was sent; 0 where none was ready.
    """

    tokens: int = 0
    sent: int = 0
    received: int = 0
    answers: int = 0


class Network:
    """A network has a node for each client, by its place in the config.

    now: simulated seconds since the run began. trips: by client, of which one at most is at work.
    held: answers that clients have and the server does not, by client. attempts: lines of what has
    been tried since they were last taken.
    """

    def __init__(
        self,
        weather: Weather,
        names: list[str],
        noticed: float,
        work: Callable[[Mapping[str, Message]], Mapping[str, Work]],
        undo: Callable[[str], None],
    ) -> None:
        """Begin at second 0. work: lets clients do what they are asked. undo: makes one forget."""
        self.time = 0.0
        self.trips: dict[str, Trip] = {}
        self.held: dict[str, Answer] = {}
        self.attempts: list[Attempt] = []
        self._weather, self._names, self._noticed = weather, names, noticed
        self._work, self._undo = work, undo
        self._pushed: dict[str, tuple[str, Message]] = {}
        self._away: set[str] = set()
        self._round, self._asked = 0, dict[str, int]()

    def now(self) -> float:
        """Return the simulated seconds since the run began."""
        return self.time

    def wait(self, seconds: float, until: float) -> None:
        """Go on to the next moment at which anything changes. Raises UserError where none comes."""
        if any(trip.known <= self.time for trip in self.depart()):
            return
        moments = [until, *(trip.known for trip in self.trips.values())]
        for client in self._away:
            moments.append(self._weather.availability(client).next_switch(self.time))
        after = min((moment for moment in moments if moment > self.time), default=math.inf)
        if math.isinf(after):
            raise UserError("conditions: nobody who is asked will ever be there again")
        self.time = after

    def online(self, nodes: Collection[int]) -> dict[int, str]:
        """Return those of these nodes whose clients are there now; none ever restarts."""
        clients = {node: self._names[node] for node in nodes}
        there = [n for n, c in clients.items() if self._weather.availability(c).at(self.time)]
        self._away = {client for node, client in clients.items() if node not in there}
        return dict.fromkeys(there, "")

    def push(self, node: int, message: Message, life: float) -> str | None:
        """Ask a client, who is there."""
        asked = self._asked if message.task.round == self._round else {}
        id = f"{message.client} {message.task.round} {asked.get(message.client, 0)}"
        self._pushed[message.client] = id, message
        return id

    def pull(self, ids: Iterable[str]) -> dict[str, Reply | Failure]:
        """Return what is known by now of these messages."""
        wanted, came = set(ids), {}
        for trip in list(self.trips.values()):
            if trip.id in wanted and trip.known <= self.time:
                del self.trips[trip.client]
                came[trip.id] = Failure(trip.lost) if trip.answer is None else trip.answer.reply
        return came

    def pending(self, round: int) -> set[str]:
        """Return the clients whose answer to that round is ready and may still come."""
        answers = {client: trip.answer for client, trip in self.trips.items()} | self.held
        return {c for c, a in answers.items() if a is not None and a.reply.round == round}

    def depart(self) -> list[Trip]:
        """Let everybody work who was asked at this moment; return what comes of it when."""
        pushed, self._pushed = self._pushed, {}
        asked: dict[str, Message] = {}
        for client, (id, message) in pushed.items():
            # Whoever has an answer that nobody waits for any more sends that first.
            given_up = self.trips.pop(client, None)
            if given_up is not None and given_up.answer is not None:
                self.held[client] = given_up.answer
            if client in self.held:
                answer, link = self.held.pop(client), self._link(message)
                self._send(id, message, answer, link, 0)
            else:
                asked[client] = message
        works = self._work(asked) if asked else {}
        for client, message in asked.items():
            id = pushed[client][0]
            if client in works:
                self._carry(id, message, works[client])
                continue
            # Whoever has no privacy left says so at once.
            self._note(message, self.time, Done(received=len(message)), SPENT)
            self.trips[client] = Trip(id, client, self.time, answer=None, lost=SPENT)
        return [self.trips[client] for client in pushed]

    def _carry(self, id: str, message: Message, work: Work) -> None:
        """Take a client through its attempt: receive, work, send; or lose it before it is done."""
        link = self._link(message)
        received = self._received(message, link)
        ready = received + work.effort / link.tokens_per_second
        answer = Answer(work.reply, work.uploaded_bytes, ready)
        loss = self._loss(message.client, link, _arrival(ready, answer, link))
        if loss.at > ready:
            self._send(id, message, answer, link, work.tokens)
            return

        # Work that was not finished is as if it had never been begun.
        self._undo(message.client)
        done = max(0.0, loss.at - received) / max(ready - received, 1e-12)
        came = _moved(len(message), link.download, loss.at - self.time - link.latency)
        self._lose(id, message, loss, Done(int(done * work.tokens), 0, came))

    def _send(self, id: str, message: Message, answer: Answer, link: Link, tokens: int) -> None:
        """Take an answer that is ready to the server, or leave it on its device."""
        # Whoever is asked again has received the question again before it answers.
        begins = max(self._received(message, link), answer.ready)
        arrives = _arrival(begins, answer, link)
        loss = self._loss(message.client, link, arrives)
        if loss.at <= arrives:
            self.held[message.client] = answer
            sent = _moved(answer.uploaded_bytes, link.upload, loss.at - begins)
            came = _moved(len(message), link.download, loss.at - self.time - link.latency)
            self._lose(id, message, loss, Done(tokens, sent, came, answer.reply.round))
            return
        done = Done(tokens, answer.uploaded_bytes, len(message), answer.reply.round)
        self._note(message, arrives, done)
        self.trips[message.client] = Trip(id, message.client, arrives, answer)

    def _received(self, message: Message, link: Link) -> float:
        """Return when a client has received what it is asked now."""
        return self.time + link.latency + len(message) / link.download

    def _link(self, message: Message) -> Link:
        if message.task.round != self._round:
            self._round, self._asked = message.task.round, {}
        attempt = self._asked.get(message.client, 0)
        self._asked[message.client] = attempt + 1
        return self._weather.link(message.client, message.task.round, attempt)

    def _loss(self, client: str, link: Link, arrives: float) -> Loss:
        """Return when a client is lost on its way, and why."""
        goes = self._weather.availability(client).lost_after(self.time)
        drops = math.inf
        if link.drops_at is not None:
            drops = self.time + link.drops_at * (arrives - self.time)
        return Loss(drops, DROPPED) if drops < goes else Loss(goes, GONE)

    def _lose(self, id: str, message: Message, loss: Loss, done: Done) -> None:
        self._note(message, loss.at, done, loss.why)
        self.trips[message.client] = Trip(
            id, message.client, loss.at + self._noticed, answer=None, lost=loss.why
        )

    def _note(self, message: Message, ended: float, done: Done, why: str | None = None) -> None:
        """Keep the line of an attempt."""
        round = message.task.round
        self.attempts.append(
            Attempt(
                round=round,
                client=message.client,
                asked=self.time,
                ended=ended,
                tokens=done.tokens,
                uploaded_bytes=done.sent,
                downloaded_bytes=done.received,
                lost=why,
                answers=done.answers if done.answers not in (0, round) else None,
            )
        )


def _arrival(begins: float, answer: Answer, link: Link) -> float:
    """Return when an answer is in whose client begins to send it at a moment."""
    return begins + link.latency + answer.uploaded_bytes / link.upload


def _moved(size: int, rate: float, seconds: float) -> int:
    """Return how many bytes of a message of that size have travelled after so many seconds."""
    return int(min(size, rate * seconds)) if seconds > 0 else 0
