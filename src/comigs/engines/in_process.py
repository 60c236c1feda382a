"""This module is the engine whose clients are all on this machine: one after the other on one base,
or spread over `workers` processes of a base each.

It is for research, tests and the demo. Whichever process has a client at work, it takes it from the
run folder and puts it back there, so who does what makes no difference to the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from comigs.bases.load import Base
from comigs.client.steps import settings_of
from comigs.client.workplace import workplace
from comigs.config import Config
from comigs.data.prepare import Texts
from comigs.data.sampling import check_text
from comigs.engines.host import ClientHost
from comigs.engines.upload_store import UploadStore
from comigs.engines.workers import Worker, Workers
from comigs.methods.method import Download, Method, Upload
from comigs.privacy.budget import SPENT, BudgetSpent
from comigs.runs.folder import RunFolder
from comigs.server.protocol import Answers, Reply, Report, Task
from comigs.server.validation import expected_upload, shapes_of_clients


class InProcess:
    """This engine's messages are function calls, here or in a process beside this one. Use `close`
    at the end.
    """

    def __init__(
        self,
        config: Config,
        method: Method,
        base: Base,
        texts: Texts,
        folder: RunFolder,
        report: Report,
    ) -> None:
        """Serve the clients of `texts`. Raises UserError where a text is too short to train on."""
        store = UploadStore(folder.scratch / "uploads")
        self.workers = Workers(config, base.device, folder, store, report)
        place = workplace(config, method, base)
        self.host = ClientHost(place, texts, folder, store, self.workers.report)
        self.shapes = shapes_of_clients(config, method, place.attachment)
        # Where clients are drawn, a text is looked at only when its client is asked.
        if config.participation.clients_per_round is None:
            for name, shapes in self.shapes.items():
                settings = settings_of(config, method, name, shapes)
                check_text(name, texts.load(name), settings, config.data.sequence_length)

    def close(self) -> None:
        """End the other processes and leave the base as it was."""
        self.workers.close()
        self.host.attachment.detach()

    def exchange(self, tasks: Mapping[str, Task], downloads: Mapping[str, Download]) -> Answers:
        """Do each client's exchange as soon as a process is free for it; return all replies."""
        parcels = self.workers.parcels(downloads)

        # Whoever has spent its privacy says no more than that.
        def here(name: str) -> Reply | None:
            with suppress(BudgetSpent):
                return self.host.exchange(name, tasks[name], downloads.get(name, {}))
            return None

        def there(worker: Worker, name: str) -> Reply | None:
            with suppress(BudgetSpent):
                return worker.exchange(name, tasks[name], parcels.get(name))
            return None

        came = self.workers.spread(tasks, here, there)
        # Who is left out of the end has what it trained.
        if not all(task.train for task in tasks.values()):
            for name in self.host.config.names:
                self.host.keep(name, self.host.config.rounds + 1)
        replies = {name: reply for name, reply in came.items() if reply is not None}
        answers = Answers(replies, {name: SPENT for name in came if name not in replies})
        if not self.host.config.privacy.secure_aggregation:
            return answers
        # It imports Flower's primitives, which other runs do without.
        from comigs.engines.summing import summed

        (round,) = {task.round for task in tasks.values()}
        expected = expected_upload(self.host.method, self.shapes[next(iter(tasks))], round)
        return summed(self.host.config, answers, downloads, expected)

    def probe(self, uploads: Mapping[str, Upload], round: int) -> dict[str, dict[str, float]]:
        """Return reader -> author -> nats per token of the author's upload on a sample of the
        reader's valid text.
        """
        parcels = self.workers.parcels(uploads)

        def here(name: str) -> dict[str, float]:
            return self.host.probe(name, uploads, round)

        def there(worker: Worker, name: str) -> dict[str, float]:
            return worker.probe(name, parcels, round)

        return self.workers.spread(uploads, here, there)
