"""A federation in one process: the real apps, trainers on real sockets, and a grid of threads in
place of Flower's.

No Ray, no SuperLink. What FLOWER's own grid does to messages (copies, ids, errors with their text)
is done here, too.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from comigs.bases.load import load_base
from comigs.config import Config
from comigs.federation.device import trainer_socket
from comigs.federation.device.device_service import Device, Trainer
from comigs.federation.flower import apps, server
from comigs.federation.flower.supernode import reply_to
from comigs.runs.environment import environment
from comigs.runs.folder import RunFolder
from comigs.server.dispatch import Polling
from tests.conftest import until

FIRST_NODE = 1000
ONE = threading.Lock()


class TestTrainer(Trainer):
    """At work one at a time: the tiny bases are drawn from torch's one generator. `before` may
    wait, or lie.
    """

    __test__ = False

    def before(self, raw: bytes) -> bytes | None:
        """An answer to give instead."""
        return None

    def answer(self, raw: bytes) -> bytes:
        if (instead := self.before(raw)) is not None:
            return instead
        with ONE:
            return super().answer(raw)


class LocalGrid(Grid):
    """Answers every message as a SuperNode does, a thread for each node, as one SuperNode works on
    one message at a time.

    trainers: the nodes' trainers' sockets. offline: nodes that cannot be reached now. seen: every
    byte that went either way.
    """

    def __init__(self, sockets: Iterable[Path]) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        self.trainers: dict[int, Path] = {}
        self.offline: set[int] = set()
        self.started: dict[int, str] = {}
        self.seen: list[bytes] = []
        self.lost: set[str] = set()
        self._workers: dict[int, ThreadPoolExecutor] = {}
        self._replies: dict[str, Future[Message]] = {}
        self._nodes: dict[str, int] = {}
        self._count = 0
        for number, socket in enumerate(sockets):
            self.add_node(FIRST_NODE + number, socket)

    def add_node(self, node: int, socket: Path) -> None:
        self.trainers[node], self.started[node] = socket, "1"
        self._workers[node] = ThreadPoolExecutor(1)

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, *_: Any, **__: Any) -> Iterable[Message]:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return [node for node in self.trainers if node not in self.offline]

    def get_nodes(self) -> list[NodeInfo]:
        return [
            NodeInfo(node_id=node, last_activated_at=self.started[node])
            for node in self.get_node_ids()
        ]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            self._count += 1
            ids.append(f"m{self._count}")
            message.metadata.__dict__["_message_id"] = ids[-1]
            node = message.metadata.dst_node_id
            self._nodes[ids[-1]] = node
            self._replies[ids[-1]] = self._workers[node].submit(self._one, deepcopy(message))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        replies = []
        for message in message_ids:
            if self._nodes[message] in self.offline:
                error = Error(ErrorCode.NODE_UNAVAILABLE, "Error: Node Unavailable")
                replies.append(Message(error, reply_to=_named(message)))
            elif message not in self.lost and self._replies[message].done():
                replies.append(deepcopy(self._replies[message].result()))
        return replies

    def restart(self, node: int) -> None:
        """The node's process was killed and started again: what it was at work on is never
        answered.
        """
        self.lost |= {message for message, where in self._nodes.items() if where == node}
        self.started[node] += "!"

    def _one(self, message: Message) -> Message:
        self.seen.append(everything(message))
        reply = reply_to(message, self.trainers[message.metadata.dst_node_id])
        self.seen.append(everything(reply))
        return reply


def _named(message_id: str) -> Message:
    message = Message(RecordDict(), FIRST_NODE, "train")
    message.metadata.__dict__["_message_id"] = message_id
    return message


def everything(message: Message) -> bytes:
    """All of a message's content as bytes: what a curious server or wire has."""
    if message.has_error():
        return repr(message.error.__dict__).encode()
    values = [value for record in message.content.values() for value in record.values()]
    raw = [getattr(value, "data", value) for value in values]
    raw = [value for value in raw if isinstance(value, bytes)]
    rest = {k: dict(v) for k, v in message.content.config_records.items()}
    return b"".join(raw) + repr((rest, list(message.content))).encode()


class Federation:
    """Trainers behind sockets, and the server's folder. `run` is what a ServerApp does."""

    def __init__(
        self, root: Path, names: Iterable[str], text: Path, trainer: type[TestTrainer] = TestTrainer
    ) -> None:
        """text: folder with one folder of text for each name."""
        self.root, self.names, self.said = root, list(names), dict[str, list[str]]()
        self.sockets = Path(tempfile.mkdtemp(prefix="comigs-"))  # a socket's path must be short
        Finalize(
            None, shutil.rmtree, (self.sockets, True), exitpriority=-1
        )  # after the listeners, which unlink theirs
        self.trainers = {name: self._start(name, text, trainer) for name in self.names}
        root.mkdir(parents=True, exist_ok=True)
        clients = {
            name: {"node_id": FIRST_NODE + i, "public_key": "-"}
            for i, name in enumerate(self.names)
        }
        (root / "clients.json").write_text(json.dumps(clients), encoding="utf-8")

    def _start(self, name: str, text: Path, kind: type[TestTrainer]) -> TestTrainer:
        lines = self.said[name] = []
        device = Device(
            name=name,
            text=name,
            home=self.root / "devices" / name,
            root=text,
            accelerator="cpu",
            threads=1,
        )
        trainer = kind(device, lines.append)
        socket = self.sockets / name
        serve = threading.Thread(
            target=trainer_socket.serve,
            args=(
                socket,
                trainer_socket.key_beside(socket),
                lambda raw: self.trainers[name].answer(raw),
            ),
            daemon=True,
        )
        serve.start()
        until(socket.exists)
        return trainer

    def grid(self) -> LocalGrid:
        return LocalGrid(self.sockets / name for name in self.names)

    def create(self, out: Path, config: Config) -> RunFolder:
        """The server's run folder, as `comigs run` makes it: nobody's text."""
        clients = tuple(client.model_copy(update={"text": None}) for client in config.clients)
        base = load_base(config.base)
        return RunFolder.create(
            out, config.model_copy(update={"clients": clients}), environment(base, {})
        )

    def go_on(self, out: Path, grid: Grid, **pace: float) -> None:
        """What the ServerApp does, from the run's last commit, but for how long it waits."""
        server.go_on(
            grid,
            out,
            self.root,
            partial(Polling, **{"look": 0.01, "seldom": 0.02, "patience": 0.3, **pace}),
        )

    def go_on_as_app(self, out: Path, grid: Grid) -> None:
        """The ServerApp itself."""
        settings = {"run-folder": str(out), "federation": str(self.root)}
        apps.server(grid, Context(1, 0, {}, RecordDict(), settings))

    def run(self, out: Path, config: Config, **pace: float) -> LocalGrid:
        """A whole run."""
        self.create(out, config)
        grid = self.grid()
        self.go_on(out, grid, **pace)
        return grid

    def device_run(self, name: str) -> Path:
        """The one run folder of a device."""
        (run,) = (self.root / "devices" / name / "runs").iterdir()
        return run


def events(out: Path) -> list[Mapping[str, Any]]:
    """What the server's side reported."""
    return [
        json.loads(line)
        for line in (out / ".progress.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def modes(folder: Path) -> set[str]:
    """Permissions of all files and folders below."""
    return {oct(os.stat(path).st_mode & 0o777) for path in (folder, *folder.rglob("*"))}
