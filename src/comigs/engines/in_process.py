"""All clients in this process, one after the other, on one base: for research, tests and the demo.

Only the client at work is in memory. Its experts and optimisers are in the run folder while it is idle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from comigs.bases.load import Base
from comigs.client.client import Client, settings_of
from comigs.client.draw import check_text
from comigs.client.evaluate import Evaluation
from comigs.config import Config, Split
from comigs.data.prepare import ClientData
from comigs.engines.answer import answer, of_the_base
from comigs.engines.check import shapes_of_clients
from comigs.engines.exchange import Answers, Reply, Report, Task
from comigs.engines.spool import Spool
from comigs.engines.wire import as_received, decode, encode, plain
from comigs.experts.attach import Attachment
from comigs.methods.method import Download, Method, Upload
from comigs.record import RunFolder
from comigs.slots import Slot

STATE = ("experts", "optimizer")  # the parts of a client's state, each a path in the run


class InProcess:
    """An engine whose messages are function calls. Holds the base, and one client at a time.

    trainers: names of the clients that train; where text is pooled, the first stands for the one place that has it all.
    """

    def __init__(
        self, config: Config, method: Method, base: Base, data: Mapping[str, ClientData], folder: RunFolder,
        report: Report,
    ) -> None:  # fmt: skip
        self.config, self.method, self.base, self.data = config, method, base, data
        self.folder, self.report = folder, report
        self.attachment = Attachment(base.model, base.architecture, config.experts, summed=method.mixing == "sum")
        self.shapes = shapes_of_clients(config, method, self.attachment)
        self.trainers = {client.name for client in config.clients[: 1 if method.pooled else None]}
        self.spool = Spool(folder.scratch / "uploads")
        self._base_evaluations: dict[tuple[Path, ...], Evaluation] = {}
        if config.participation.clients_per_round is None:  # else it is found when a client is asked
            for name, shapes in self.shapes.items():
                check_text(name, data[name], settings_of(config, method, shapes), config.data.sequence_length)

    def exchange(self, tasks: Mapping[str, Task], downloads: Mapping[str, Download]) -> Answers:
        """One client after the other."""
        return Answers({name: self._ask(name, task, downloads.get(name, {})) for name, task in tasks.items()})

    def probe(self, uploads: Mapping[str, Upload], round: int) -> dict[str, dict[str, float]]:
        """reader -> author -> nats per token of the author's upload on a sample of the reader's valid."""
        received = {name: as_received(upload, self.config.upload.format) for name, upload in uploads.items()}
        nats = {name: self.client(name, staged=True).probe(received, round) for name in uploads}
        self.attachment.unbind()
        return nats

    def client(self, name: str, staged: bool = False) -> Client:
        """A client as it was when the last round ended, or, staged, as it has left its exchange since then."""
        path, state = f"clients/{name}", None
        if self.folder.holds(f"{path}/{STATE[0]}", staged):
            state = {part: self.folder.load(f"{path}/{part}", staged) for part in STATE}
        client = Client(name, self.config, self.method, self.base, self.attachment, self.data[name], state)
        client.is_trainer = name in self.trainers
        if self.method.pooled and client.is_trainer:
            client.pool(list(self.data.values()))
        return client

    def _ask(self, name: str, task: Task, download: Download) -> Reply:
        """One client's exchange, from the disk and back to the disk."""
        client, received = self.client(name), as_received(download, self.config.upload.format)
        reply = answer(client, task, received, self.report, self._base_evaluation)
        state = client.state()
        for part, tensors in state.items() if task.train else [("personal", state["experts"])]:
            self.folder.stage(f"clients/{name}/{part}", tensors, task.round)
        self.attachment.unbind()
        if reply.upload is None:
            return reply
        return replace(reply, upload=self.spool.add(name, self._sent(name, task, reply.upload, received)))

    def _sent(self, name: str, task: Task, upload: Upload, received: Download) -> Upload:
        """The upload as it comes in at the server, after the format that numbers travel in."""
        format, path = self.config.upload.format, f"clients/{name}/residual"
        if format == "float32":
            return upload
        held = self.folder.load(path) if self.folder.holds(path) else {}
        encoded, residual = encode(upload, received, format, {Slot.parse(key): t for key, t in held.items()})
        if residual:
            self.folder.stage(path, plain(residual), task.round)
        return decode(encoded, {slot: tuple(t.shape) for slot, t in upload.items()}, received, format)

    def _base_evaluation(self, client: Client, split: Split) -> Evaluation:
        """The base is the same for all: a text that several clients have is read once."""
        text = tuple(store.folder for store in getattr(client.data, split))
        if text not in self._base_evaluations:
            self._base_evaluations[text] = of_the_base(client, split)
        return self._base_evaluations[text]
