"""One base, and the clients that take turns on it: each comes from the run folder and goes back to
it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from comigs.bases.load import Base
from comigs.client.client import Client, Workplace
from comigs.config import Config
from comigs.data.prepare import Texts
from comigs.engines.base_evaluation_cache import base_figures
from comigs.engines.client_task import run_task
from comigs.engines.upload_store import UploadStore
from comigs.experts.attach import Attachment
from comigs.methods.method import Download, Method, Upload
from comigs.runs.folder import RunFolder
from comigs.server.protocol import Reply, Report, Task
from comigs.server.wire import as_received, decode, encode, plain
from comigs.slots import Slot

STATE = ("experts", "optimizer")  # the parts of a client's state, each a path in the run


class ClientHost:
    """Holds the base, and one client at a time; its experts and optimisers are in the run folder
    while it is idle.

    trainers: names of the clients that train; where text is centralized, the first stands for the one
    place that has it all.
    """

    def __init__(
        self, config: Config, method: Method, base: Base, data: Texts, folder: RunFolder,
        store: UploadStore, report: Report,
    ) -> None:  # fmt: skip
        """store: where uploads go."""
        self.config, self.method, self.base, self.data = config, method, base, data
        self.folder, self.store, self.report = folder, store, report
        self.attachment = Attachment(
            base.model, base.architecture, config.experts, summed=method.mixing == "sum"
        )
        self.trainers = {
            client.name for client in config.clients[: 1 if method.centralized else None]
        }

    def client(self, name: str, staged: bool = False) -> Client:
        """A client as it was when the last round ended, or, staged, as it has left its exchange
        since then.
        """
        path, state = f"clients/{name}", None
        if self.folder.holds(f"{path}/{STATE[0]}", staged):
            state = {part: self.folder.load(f"{path}/{part}", staged) for part in STATE}
        place = Workplace(self.config, self.method, self.base, self.attachment)
        client = Client(name, place, self.data.load(name), state)
        client.is_trainer = name in self.trainers
        if self.method.centralized and client.is_trainer:
            client.pool(list(self.data.load_all().values()))
        return client

    def exchange(self, name: str, task: Task, download: Download) -> Reply:
        """One client's exchange, from the disk and back to the disk."""
        client, received = self.client(name), as_received(download, self.config.upload.format)
        reply = run_task(client, task, received, self.report, base_figures)
        state = client.state()
        for part, tensors in state.items() if task.train else [("personal", state["experts"])]:
            self.folder.stage(f"clients/{name}/{part}", tensors, task.round)
        self.attachment.unbind()
        if reply.upload is None:
            return reply
        return replace(
            reply, upload=self.store.add(name, self._sent(name, task, reply.upload, received))
        )

    def probe(self, name: str, uploads: Mapping[str, Upload], round: int) -> dict[str, float]:
        """author -> nats per token of the author's upload on a sample of this client's valid."""
        received = {
            author: as_received(upload, self.config.upload.format)
            for author, upload in uploads.items()
        }
        nats = self.client(name, staged=True).probe(received, round)
        self.attachment.unbind()
        return nats

    def _sent(self, name: str, task: Task, upload: Upload, received: Download) -> Upload:
        """The upload as it comes in at the server, after the format that numbers travel in."""
        format, path = self.config.upload.format, f"clients/{name}/residual"
        if format == "float32":
            return upload
        held = self.folder.load(path) if self.folder.holds(path) else {}
        encoded, residual = encode(
            upload, received, format, {Slot.parse(key): t for key, t in held.items()}
        )
        if residual:
            self.folder.stage(path, plain(residual), task.round)
        return decode(
            encoded, {slot: tuple(t.shape) for slot, t in upload.items()}, received, format
        )
