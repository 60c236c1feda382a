"""This module is a run in a federation, as the operator sees it: checked, submitted to the server,
followed to its end.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

from comigs.bases.load import Base
from comigs.config import Config
from comigs.errors import Stopped, UserError
from comigs.federation.messages import PROGRESS, federable_method
from comigs.federation.operator import flwr_cli
from comigs.federation.operator.folder import Federation
from comigs.files import command
from comigs.methods.loading import load_method
from comigs.runs.environment import environment
from comigs.runs.folder import RunFolder
from comigs.runs.json_lines import read_event
from comigs.runs.metrics import Event, Problem
from comigs.runs.new import new_folder
from comigs.runs.summary import write_summary
from comigs.runs.track.tracks import Tracks
from comigs.server.protocol import Report
from comigs.text import Say

LOOK = 0.5  # seconds between looks at it
ASK = 30.0  # seconds between questions to the server, which cost it two seconds of CPU
LET_GO = 30.0  # seconds for a stopped run's process to end


def check(config: Config, path: Path) -> Federation:
    """Return the federation that can run this config. Raises UserError where it cannot."""
    # Text and cores are the devices' own; a config that names them means another engine.
    federation = Federation.open(path)
    for client in config.clients:
        if client.text is not None:
            raise UserError(
                f"clients.{client.name}.text: given, but in a federation each client's text is on "
                "its own device; leave it out"
            )
    if config.workers > 1:
        raise UserError(
            f"workers: given {config.workers}, but devices of a federation work by themselves; "
            "leave it out"
        )
    federable_method(config)

    # Devices would be sent something else than they were asked to run, and refuse it.
    federation.require_running()
    _require_members(config, federation)
    if (app := flwr_cli.app_hash()) != federation.settings.app:
        raise UserError(
            f"{path}: Flower or Python here now make another app bundle ({app[:12]}...) than "
            f"devices were told to run ({federation.settings.app[:12]}...); go back to the "
            "versions it was founded with, or found a new one"
        )
    return federation


def run(
    config: Config, base: Base, out: Path | None, federation: Federation, report: Report, say: Say
) -> RunFolder:
    """Run a checked and resolved config as a whole; return the run folder. Raises UserError, and
    Stopped after Ctrl-C.
    """
    _require_pinned(config, base, federation)
    where = {"folder": str(federation.path), "id": federation.settings.id}
    folder = new_folder(out, config, environment(base, {}) | {"federation": where})
    say(f"run folder {folder.path}")
    federation.note_run(folder.path.resolve(), config.names)
    _go(folder, federation, report, say)
    return folder


def _require_pinned(config: Config, base: Base, federation: Federation) -> None:
    """Refuse a base that devices would refuse. Raises UserError."""
    pinned = federation.settings.base
    told = config.base.model_copy(update={"name": base.title})
    if pinned is not None and (difference := pinned.differs(told, base.fingerprint)):
        raise UserError(
            f"{difference} in the bundles of this federation, and devices load no other; "
            "found another federation for it, with: comigs federation init DIR --base NAME "
            "(--dtype, --weights)"
        )


def resume(folder: RunFolder, report: Report, say: Say) -> None:
    """Go on with a federated run from its last whole round. Raises UserError, and Stopped after
    Ctrl-C.
    """
    with folder:  # nobody works on it
        config, last = folder.config(), folder.rewind()
        if last.finished:
            with Tracks(config, folder, report):
                pass  # they are told what they lack
    if last.finished:
        say(f"{folder.path}: finished already; nothing to go on with")
        _summarize(folder)
        return

    # Another federation has other devices, even where it is at the same place.
    where = folder.environment()["federation"]
    federation = Federation.open(Path(where["folder"]))
    if federation.settings.id != where["id"]:
        raise UserError(
            f"{folder.path}: began in federation {where['id']}, but {federation.path} is now "
            f"federation {federation.settings.id}"
        )
    federation.require_running()

    # A run that has begun goes on without those who were revoked since.
    members, revoked = federation.clients(), []
    if last.round:
        revoked = [name for name in config.names if name not in members]
    _require_members(config, federation, revoked)
    if revoked:
        say(f"not in the federation any more, so absent from now on: {', '.join(revoked)}")
    say(f"going on after round {last.round} of {config.rounds}")
    _go(folder, federation, report, say)


def _require_members(config: Config, federation: Federation, but: Collection[str] = ()) -> None:
    for client in config.clients:
        if client.name not in but and federation.client_named(client.name).node_id is None:
            raise UserError(
                f'{federation.path}: "{client.name}" is not registered yet; '
                f"start the server again: {command('federation server', federation.path)}"
            )


def _go(folder: RunFolder, federation: Federation, report: Report, say: Say) -> None:
    # What an earlier start of the run reported is in the file already.
    progress, again, start = folder.path / PROGRESS, command("resume", folder.path), 0
    if folder.files.has(PROGRESS):
        start = progress.stat().st_size
    events = _events(progress, start)
    run_id = flwr_cli.submit(federation, folder.path.resolve())
    say(f"submitted as run {run_id}")
    try:
        status, problem = _follow(folder, federation, run_id, events, report)
    except KeyboardInterrupt:
        with suppress(UserError):  # the server may be gone
            flwr_cli.stop_run(federation, run_id)
        _wait_until_free(folder)
        raise Stopped(f"every whole round is kept; go on with: {again}") from None
    if status != "finished:completed" or not folder.checkpoint().finished:
        raise UserError(
            f"{folder.path}: {problem or status}; every whole round is kept, go on with: {again}"
        )
    _summarize(folder)


def _follow(
    folder: RunFolder,
    federation: Federation,
    run_id: int,
    events: Iterator[Event | None],
    report: Report,
) -> tuple[str, str]:
    """Report what happens until the run has ended; return its true status and what went wrong."""
    # To ask the server costs it time, so it is asked when the run seems to be over, else seldom.
    status, problem, wait, asked = "", "", 2.0, time.monotonic()
    for event in events:
        if event is not None:
            if isinstance(event, Problem):
                problem = event.message
            else:
                report(event)
        elif status.startswith("finished"):  # and all that it had to say was read
            break
        elif not federation.running:
            return "the server has stopped", ""
        else:
            time.sleep(LOOK)
            over = bool(problem) or folder.checkpoint().finished
            if time.monotonic() - asked > (1.0 if over else wait):
                with suppress(UserError):  # it may be stopping
                    status, details = flwr_cli.run_status(federation, run_id)
                    problem = problem or details
                wait, asked = min(2 * wait, ASK), time.monotonic()
    return status, problem


def _events(file: Path, start: int) -> Iterator[Event | None]:
    """Yield what is written to the file after `start` bytes, line by line; None whenever there is
    nothing new.
    """
    while not file.exists():
        yield None
    with file.open(encoding="utf-8") as lines:
        lines.seek(start)
        unfinished = ""
        while True:
            unfinished += lines.readline()
            if unfinished.endswith("\n"):
                yield read_event(json.loads(unfinished), str(file))
                unfinished = ""
            else:
                yield None


def _wait_until_free(folder: RunFolder) -> None:
    """Wait until a stopped run's process has noticed, and lets go of the folder."""
    end = time.monotonic() + LET_GO
    while time.monotonic() < end:
        with suppress(UserError), folder:
            return
        time.sleep(LOOK)


def _summarize(folder: RunFolder) -> None:
    config = folder.config()
    write_summary(folder, config, load_method(config))
