"""This module hosts clients: they take turns on one base, and each comes from the run folder and
goes back to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from comigs.client.client import Client
from comigs.client.state import STATE
from comigs.client.workplace import Workplace
from comigs.data.prepare import Texts
from comigs.engines.base_evaluation_cache import cached_base_evaluation
from comigs.engines.client_task import run_task
from comigs.engines.conditions.weather import Weather
from comigs.engines.upload_store import UploadStore
from comigs.methods.method import Download, Upload
from comigs.privacy.budget import Ledger, run_budget
from comigs.runs.folder import RunFolder
from comigs.server.protocol import Reply, Report, Task
from comigs.server.wire import as_received, decode, encode, plain
from comigs.slots import Slot


class ClientHost:
    """A host holds the base, and one client at a time; experts and optimisers of all others are in
    the run folder.

    trainers: names of the clients that train; where text is centralized, the first stands for the
    one place that has it all.
    """

    def __init__(
        self, place: Workplace, texts: Texts, folder: RunFolder, store: UploadStore, report: Report
    ) -> None:
        """Serve the clients of `texts`. store: where uploads go."""
        self.place, self.texts = place, texts
        self.folder, self.store, self.report = folder, store, report
        self.config, self.method, self.attachment = place.config, place.method, place.attachment
        trains = self.config.clients[: 1 if self.method.centralized else None]
        self.weather = Weather(place.config)
        self.trainers = {client.name for client in trains}

    def client(self, name: str, staged: bool = False) -> Client:
        """Return a client as it was when the last round ended, or, staged, as it has left its
        exchange since then.
        """
        paths = {part: f"clients/{name}/{part}" for part in STATE}
        held = {part: path for part, path in paths.items() if self.folder.holds(path, staged)}
        state = {part: self.folder.load(path, staged) for part, path in held.items()}
        data, budget = self.texts.load(name), None
        if self.config.privacy.by_document:
            # What was spent is no part of a round that could be rewound.
            ledger = Ledger(self.folder.files, f"clients/{name}/privacy.json")
            documents = sum(store.num_documents for store in data.train)
            budget = run_budget(self.config, name, documents, ledger, "this run")
        client = Client(name, self.place, data, state or None, budget)
        client.is_trainer = name in self.trainers
        if self.method.centralized and client.is_trainer:
            client.pool(list(self.texts.load_all().values()))
        return client

    def exchange(self, name: str, task: Task, download: Download) -> Reply:
        """Do one client's exchange, from the disk and back to the disk; return its reply."""
        self.store.close()
        client, received = self.client(name), as_received(download, self.config.upload.format)
        specialists = self.weather.specialists(name, task.round)
        client, reply = run_task(
            client, task, received, self.report, cached_base_evaluation, specialists
        )

        # The client leaves the base with all that it is; after the last round only its model stays.
        state = client.state()
        left = state if task.train else {"personal": state["experts"]}
        for part, tensors in left.items():
            self.folder.stage(f"clients/{name}/{part}", tensors, task.round)
        self.attachment.unbind()
        if reply.upload is None:
            return reply
        sent = self._sent(name, task, reply.upload, received)
        return replace(reply, upload=self.store.add(name, sent))

    def keep(self, name: str, round: int) -> None:
        """Keep the model that a client has so far as its own, where no other comes."""
        if self.folder.holds(f"clients/{name}/personal", staged=True):
            return
        for part in ("best", "experts"):
            if self.folder.holds(path := f"clients/{name}/{part}"):
                self.folder.stage(f"clients/{name}/personal", self.folder.load(path), round)
                return

    def probe(self, name: str, uploads: Mapping[str, Upload], round: int) -> dict[str, float]:
        """Return author -> nats per token of the author's upload on a sample of this client's
        valid text.
        """
        format, received = self.config.upload.format, {}
        for author, upload in uploads.items():
            received[author] = as_received(upload, format)
        nats = self.client(name, staged=True).probe(received, round)
        self.attachment.unbind()
        return nats

    def _sent(self, name: str, task: Task, upload: Upload, received: Download) -> Upload:
        """Return the upload as it comes in at the server, after the format that numbers travel
        in.
        """
        format, path = self.config.upload.format, f"clients/{name}/residual"
        if format == "float32":
            return upload
        # What rounding leaves over is added to the next upload, and so belongs to the client.
        held = self.folder.load(path) if self.folder.holds(path) else {}
        left_over = {Slot.parse(key): tensor for key, tensor in held.items()}
        encoded, residual = encode(upload, received, format, left_over)
        if residual:
            self.folder.stage(path, plain(residual), task.round)
        shapes = {slot: tuple(tensor.shape) for slot, tensor in upload.items()}
        return decode(encoded, shapes, received, format)
