"""This module is the in-process engine with simulated devices and links before its clients.

Who is asked when, who is late and who is waited for no longer is decided by the dispatcher of real
federations, over a simulated network and by its clock. Only what training takes is simulated, not
what it does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from comigs.config import Config
from comigs.engines.conditions.merged import Merged
from comigs.engines.conditions.network import Message, Network, Work
from comigs.engines.conditions.saved import saved, unsaved
from comigs.engines.conditions.weather import Weather
from comigs.engines.in_process import InProcess
from comigs.methods.method import Download, Method, Upload
from comigs.runs.folder import RunFolder
from comigs.runs.metrics import Evaluation, TrainReport
from comigs.runs.simulated import Exchange
from comigs.server.communication import traffic
from comigs.server.dispatch import Dispatcher, Polling, Question
from comigs.server.protocol import Answers, Engine, Reply, Report, Task
from comigs.server.validation import read_reply
from comigs.server.wire import download_bytes
from comigs.slots import Shapes

STATE = "server/conditions"  # path in the run: the clock, and what is on its way
READ = 0.45  # of a trained token's work is that of one that is only measured (docs/conditions.md)


class Clients(Engine, Protocol):
    """Clients that are all here, for simulated devices to stand before."""

    def close(self) -> None:
        """Give back what they hold."""


class Conditions:
    """This engine's clients work in process, behind links and on devices that are simulated.

    The exchange after the last round is no part of the simulation: everybody is measured.
    """

    def __init__(
        self,
        config: Config,
        method: Method,
        clients: Clients,
        folder: RunFolder,
        report: Report,
    ) -> None:
        """Go on from what the run folder holds. clients: the engine that they work in."""
        self._config, self._method, self._clients, self._folder = config, method, clients, folder
        names = config.names
        self._weather = Weather(config)
        self._network = Network(
            self._weather, names, config.conditions.noticed, self._work, self._undo
        )
        polling = Polling(config.participation.deadline, config.conditions.patience)
        nodes = {name: node for node, name in enumerate(names)}
        self._dispatcher = Dispatcher[Reply](self._network, nodes, polling, report, self._network)
        self._merged = Merged()
        if folder.holds(STATE):
            unsaved(folder.load(STATE), self._network, self._dispatcher, self._merged)

    @property
    def shapes(self) -> Mapping[str, Shapes]:
        """The shape of every tensor that a client has, by client."""
        return self._clients.shapes

    def close(self) -> None:
        """End the other processes and leave the base as it was."""
        self._clients.close()

    def exchange(self, tasks: Mapping[str, Task], downloads: Mapping[str, Download]) -> Answers:
        """Ask each client that is there; return what is in by the deadline of the simulated
        clock.
        """
        (round,) = {task.round for task in tasks.values()}
        self._merged.begin(round)
        if not any(task.train for task in tasks.values()):
            return self._clients.exchange(tasks, self._unseen(downloads))
        began, questions = self._network.now(), {}
        for name, task in tasks.items():
            questions[name] = self._question(name, task, downloads.get(name, {}))
        came = self._dispatcher.gather(questions, replaceable=not self._config.asks_all)
        in_time = [name for name, reply in came.late.items() if reply.round == round]
        for name in [*came.answers, *in_time]:
            self._merged.deliver(name)

        # Whoever was asked at the very moment of its end works in this round, too: what is not on
        # its way when the round is committed would be lost with it.
        self._network.depart()

        # Answers go on in the order of the tasks, whoever was first.
        replies = {name: came.answers[name] for name in tasks if name in came.answers}
        took = Exchange(round=round, began=began, ended=self._network.now())
        lines = [took, *self._network.attempts]
        self._network.attempts = []
        self._save(round)
        return Answers(replies, came.absent, came.late, lines, self._network.pending(round))

    def probe(self, uploads: Mapping[str, Upload], round: int) -> dict[str, dict[str, float]]:
        """Let every client of `uploads` measure all of them, which takes as long as the slowest
        takes; nobody is lost in between.
        """
        nats = self._clients.probe(uploads, round)
        format, seconds = self._config.upload.format, [0.0]
        sizes = {name: download_bytes(upload, format) for name, upload in uploads.items()}
        tokens = READ * len(uploads) * self._method.probe * self._config.data.sequence_length
        for name in uploads:
            link = self._weather.link(name, round, 0)
            moved = (sum(sizes.values()) - sizes[name]) / link.download
            seconds.append(2 * link.latency + moved + tokens / link.tokens_per_second)
        self._network.time += max(seconds)
        self._save(round)
        return nats

    def _question(self, name: str, task: Task, download: Download) -> Question[Reply]:
        size = download_bytes(download, self._config.upload.format)
        message = Message(name, task, download, size)
        return Question(name, task.round, lambda: message, lambda reply, _: reply)

    def _work(self, messages: Mapping[str, Message]) -> dict[str, Work]:
        """Let clients do what they are asked, and count what that took them."""
        tasks = {name: message.task for name, message in messages.items()}
        downloads = {name: m.download for name, m in messages.items() if m.download}
        replies = self._clients.exchange(tasks, self._unseen(downloads)).replies
        for name in replies:
            self._merged.add(name, downloads.get(name, {}))
        return {name: self._counted(reply, downloads.get(name)) for name, reply in replies.items()}

    def _counted(self, reply: Reply, download: Download | None) -> Work:
        tokens, read = 0, 0
        for line in read_reply(reply)[0]:
            if isinstance(line, TrainReport):
                tokens += line.local_tokens + line.router_tokens
            elif isinstance(line, Evaluation):
                read += line.tokens or 0
        # A method that weighs its download measures it a few times.
        if download and self._method.mix is not None:
            length = self._config.data.sequence_length
            read += self._method.looks * self._method.probe * length
        moved = traffic(reply.upload or {}, download or {}, self._config.upload.format)
        return Work(reply, tokens, tokens + READ * read, moved.uploaded_bytes)

    def _unseen(self, downloads: Mapping[str, Download]) -> dict[str, Download]:
        return {name: self._merged.unseen(name, sent) for name, sent in downloads.items()}

    def _undo(self, client: str) -> None:
        self._folder.discard(f"clients/{client}/")
        self._merged.undo(client)

    def _save(self, round: int) -> None:
        self._folder.stage(STATE, saved(self._network, self._dispatcher, self._merged), round)


def engine_for(
    config: Config, method: Method, clients: InProcess, folder: RunFolder, report: Report
) -> InProcess | Conditions:
    """Return the engine of a run: its clients as they are, or behind the conditions it gives."""
    if not config.conditions.given:
        return clients
    return Conditions(config, method, clients, folder, report)


def with_machine(config: Config, step_seconds: Callable[[], float]) -> Config:
    """Return the config with the speed of this machine where any device's is a multiple of it.

    step_seconds: measures a local step; it is called where that is needed.
    """
    conditions = config.conditions
    if conditions.machine is not None or all(c.speed is None for c in conditions.everyone()):
        return config
    tokens = config.client.batch_size * config.data.sequence_length / step_seconds()
    measured = conditions.model_copy(update={"machine": tokens})
    return config.model_copy(update={"conditions": measured})
