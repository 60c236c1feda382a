"""This module is a run on the server, from a run folder's last commit to its end, as Flower starts
it.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from comigs.bases.load import load_base
from comigs.config import Config
from comigs.errors import UserError
from comigs.experts.attach import Attachment
from comigs.federation.flower.engine import FederatedRun, Flower, most_of_answer
from comigs.federation.flower.grid import GridTransport
from comigs.federation.messages import PROGRESS, RUN_ID, federable_method
from comigs.federation.security.answers import allow_answers
from comigs.files import ClosedFolder, writing
from comigs.methods.method import Method
from comigs.runs.environment import require_same_base
from comigs.runs.folder import RunFolder
from comigs.runs.metrics import Event, Note, Problem
from comigs.server.dispatch import Dispatcher, Polling
from comigs.server.protocol import Report
from comigs.server.rounds import run_rounds
from comigs.server.validation import shapes_of_clients
from comigs.slots import Shapes


def go_on(
    grid: Grid, path: Path, federation: Path, polling: Callable[[float], Polling] = Polling
) -> None:
    """Run a run to its end. federation: its folder. polling: made of the deadline."""
    # Whoever watches reads the file, where what goes wrong is an event, too.
    appended = ClosedFolder(path).open(PROGRESS, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with os.fdopen(appended, "a", encoding="utf-8") as progress:

        def report(event: Event) -> None:
            progress.write(json.dumps(event.as_json()) + "\n")
            progress.flush()

        try:
            with RunFolder.open(path) as folder:
                nodes = _nodes(folder, federation)
                deadline = folder.config().participation.deadline
                transport = GridTransport(grid)
                dispatcher: Dispatcher[Any] = Dispatcher(
                    transport, nodes, polling(deadline), report
                )
                rounds(folder, federation, dispatcher, report)
        except UserError as error:
            report(Problem(message=str(error)))
            raise
        except BaseException as error:
            what = f"{type(error).__name__}, a bug or a lost connection"
            report(Problem(message=f"{path}: {what}; see log"))
            raise


def rounds(
    folder: RunFolder, federation: Path, dispatcher: Dispatcher[Any], report: Report
) -> None:
    """Run all rounds that are left. federation: its folder. Raises UserError."""
    # The server needs the base to know what clients have, and that it is the one they have.
    config = folder.config()
    method = federable_method(config)
    report(Note(message="reading the base"))
    fingerprint, shapes = _base(folder, config, method)
    folder.rewind()

    # From now on the gateway lets answers of this run in, which may be larger than earlier ones.
    with writing(federation, "make room or allow writing"):
        allow_answers(federation, max(most_of_answer(config, method, of) for of in shapes.values()))
    run = FederatedRun(_run_id(folder), config, method, fingerprint, shapes)
    run_rounds(config, method, Flower(run, folder, dispatcher), folder, report)


def _base(folder: RunFolder, config: Config, method: Method) -> tuple[str, dict[str, Shapes]]:
    """Return the base's fingerprint and the shapes of what is put on it; the server needs no more
    of it. Raises UserError where it is not the run's.
    """
    base = load_base(config.base)
    require_same_base(folder, base)
    with Attachment(base.model, base.architecture, config.experts) as attachment:
        return base.fingerprint, shapes_of_clients(config, method, attachment)


class Nodes(Mapping[str, int]):
    """Nodes are where a run's clients are, client -> node id, as clients.json says now.

    Who was revoked keeps the node it had, at which nobody is; who is invited again has another.
    """

    def __init__(self, file: Path, names: Collection[str], known: Mapping[str, int]) -> None:
        """Begin with what is known. names: of the run's clients."""
        self._file, self._names, self._known = file, names, dict(known)
        self._read: tuple[int, int] = (0, 0)  # when the file was changed, and which it is

    def __getitem__(self, name: str) -> int:
        self._look()
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        self._look()
        return iter(self._known)

    def __len__(self) -> int:
        self._look()
        return len(self._known)

    def _look(self) -> None:
        """Read the file anew where it has changed. One that cannot be read changes nothing."""
        with suppress(OSError, ValueError, TypeError, LookupError, AttributeError):
            found = self._file.stat()
            if (found.st_mtime_ns, found.st_ino) != self._read:
                clients = json.loads(self._file.read_text(encoding="utf-8"))
                for name in clients.keys() & self._names:
                    if (node := clients[name]["node_id"]) is not None:
                        self._known[name] = int(node)
                self._read = (found.st_mtime_ns, found.st_ino)


def _nodes(folder: RunFolder, federation: Path) -> Nodes:
    """Return where clients are. Raises UserError where one was not invited."""
    # Once the run has begun, who is missing was revoked, and stays away.
    file, has_begun = federation / "clients.json", folder.checkpoint().round > 0
    names = folder.config().names
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        asked = [name for name in names if name in known or not has_begun]
        return Nodes(file, names, {name: int(known[name]["node_id"]) for name in asked})
    except KeyError as error:
        raise UserError(
            f"{file}: no client {error}; invite it with: comigs federation invite DIR NAME"
        ) from None
    except (OSError, ValueError, TypeError):
        raise UserError(
            f"{file}: missing, damaged, or with clients that are not registered yet"
        ) from None


def _run_id(folder: RunFolder) -> str:
    """Return the run's id, the same for as long as the folder lives; the name in front is for
    people.
    """
    if not folder.files.has(RUN_ID):
        name = re.sub(r"[^A-Za-z0-9]+", "-", folder.config().name).strip("-")[:40]
        made = f"{name or 'run'}-{secrets.token_hex(6)}"
        folder.files.write(RUN_ID, lambda path: path.write_text(made, encoding="utf-8"))
    return folder.files.read(RUN_ID).decode("utf-8")
