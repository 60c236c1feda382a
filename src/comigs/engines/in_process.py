"""All clients on this machine: one after the other on one base, or spread over `workers` processes
of a base each.

For research, tests and the demo. Whichever process has a client at work, it takes it from the run
folder and puts it back there, so who does what makes no difference to the result.
"""

from __future__ import annotations

from collections.abc import Mapping

from comigs.bases.load import Base
from comigs.client.steps import settings_of
from comigs.config import Config
from comigs.data.prepare import Texts
from comigs.data.sampling import check_text
from comigs.engines.host import ClientHost
from comigs.engines.upload_store import UploadStore
from comigs.engines.workers import Workers
from comigs.methods.method import Download, Method, Upload
from comigs.runs.folder import RunFolder
from comigs.server.protocol import Answers, Report, Task
from comigs.server.validation import shapes_of_clients


class InProcess:
    """An engine whose messages are function calls, here or in a process beside this one. `close` it
    at the end.
    """

    def __init__(
        self, config: Config, method: Method, base: Base, data: Texts, folder: RunFolder,
        report: Report,
    ) -> None:  # fmt: skip
        store = UploadStore(folder.scratch / "uploads")
        self.workers = Workers(config, base.device, folder, store, report)
        self.host = ClientHost(config, method, base, data, folder, store, self.workers.report)
        self.shapes = shapes_of_clients(config, method, self.host.attachment)
        if (
            config.participation.clients_per_round is None
        ):  # else it is found when a client is asked
            for name, shapes in self.shapes.items():
                check_text(
                    name,
                    data.load(name),
                    settings_of(config, method, shapes),
                    config.data.sequence_length,
                )

    def close(self) -> None:
        """End the other processes and leave the base as it was."""
        self.workers.close()
        self.host.attachment.detach()

    def exchange(self, tasks: Mapping[str, Task], downloads: Mapping[str, Download]) -> Answers:
        """Each client as soon as a process is free for it."""
        parcels = self.workers.parcels(downloads)
        return Answers(
            self.workers.spread(
                tasks,
                lambda name: self.host.exchange(name, tasks[name], downloads.get(name, {})),
                lambda worker, name: worker.exchange(name, tasks[name], parcels.get(name)),
            )
        )

    def probe(self, uploads: Mapping[str, Upload], round: int) -> dict[str, dict[str, float]]:
        """reader -> author -> nats per token of the author's upload on a sample of the reader's
        valid.
        """
        parcels = self.workers.parcels(uploads)
        return self.workers.spread(
            uploads,
            lambda name: self.host.probe(name, uploads, round),
            lambda worker, name: worker.probe(name, parcels, round),
        )
