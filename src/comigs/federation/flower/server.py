"""A run on the server: from a run folder's last commit to its end, as Flower starts it."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from comigs.bases.load import load_base
from comigs.config import Config
from comigs.errors import UserError
from comigs.experts.attach import Attachment
from comigs.federation.flower.dispatch import Dispatcher, Polling
from comigs.federation.flower.engine import Flower
from comigs.federation.flower.grid import GridTransport
from comigs.federation.messages import PROGRESS, RUN_ID, federable_method
from comigs.files import write_whole
from comigs.methods.method import Method
from comigs.runs.folder import RunFolder
from comigs.runs.metrics import Event, Note, Problem
from comigs.server.protocol import Report
from comigs.server.rounds import run_rounds
from comigs.server.validation import shapes_of_clients
from comigs.slots import Shapes


def go_on(
    grid: Grid, path: Path, federation: Path, pace: Callable[[float], Polling] = Polling
) -> None:
    """A run to its end. federation: its folder. pace: from the deadline. What goes wrong is an
    "error" event, too.
    """
    with (path / PROGRESS).open("a", encoding="utf-8") as progress:

        def report(event: Event) -> None:
            progress.write(json.dumps(event.as_json()) + "\n")
            progress.flush()

        try:
            with RunFolder.open(path) as folder:
                nodes = _nodes(folder, federation)
                deadline = folder.config().participation.deadline
                rounds(
                    folder, Dispatcher(GridTransport(grid), nodes, pace(deadline), report), report
                )
        except UserError as error:
            report(Problem(message=str(error)))
            raise
        except BaseException as error:
            what = f"{type(error).__name__}, a bug or a lost connection"
            report(Problem(message=f"{path}: {what}; see log"))
            raise


def rounds(folder: RunFolder, courier: Dispatcher[Any], report: Report) -> None:
    """All rounds that are left. Raises UserError."""
    config = folder.config()
    method = federable_method(config)
    report(Note(message="reading the base"))
    fingerprint, shapes = _base(config, method)
    if fingerprint != folder.environment()["base_fingerprint"]:
        raise UserError(
            f'{folder.path}: base "{config.base.name}" is not the one this run began with'
        )
    folder.rewind()
    run_rounds(
        config,
        method,
        Flower(config, method, folder, _run_id(folder), fingerprint, shapes, courier),
        folder,
        report,
    )


def _base(config: Config, method: Method) -> tuple[str, dict[str, Shapes]]:
    """The base's fingerprint and the shapes of what is put on it. The server needs no more of
    it.
    """
    base = load_base(config.base)
    with Attachment(base.model, base.architecture, config.experts) as attachment:
        return base.fingerprint, shapes_of_clients(config, method, attachment)


def _nodes(folder: RunFolder, federation: Path) -> dict[str, int]:
    """client -> node id. Raises UserError naming who was not invited, unless the run has begun:
    then it was revoked.
    """
    file, has_begun = federation / "clients.json", folder.checkpoint().round > 0
    names = [client.name for client in folder.config().clients]
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        return {
            name: int(known[name]["node_id"]) for name in names if name in known or not has_begun
        }
    except KeyError as error:
        raise UserError(
            f"{file}: no client {error}; invite it with: comigs federation invite DIR NAME"
        ) from None
    except (OSError, ValueError, TypeError):
        raise UserError(
            f"{file}: missing, damaged, or with clients that are not registered yet"
        ) from None


def _run_id(folder: RunFolder) -> str:
    """The same for as long as the folder lives; with the run's name in front, for people."""
    file = folder.path / RUN_ID
    if not file.exists():
        name = re.sub(r"[^A-Za-z0-9]+", "-", folder.config().name).strip("-")[:40]
        made = f"{name or 'run'}-{secrets.token_hex(6)}"
        write_whole(file, lambda path: path.write_text(made, encoding="utf-8"))
    return file.read_text(encoding="utf-8")
