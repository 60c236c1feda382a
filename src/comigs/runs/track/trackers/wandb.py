"""Weights & Biases: offline in the run folder, or online where $WANDB_MODE says so."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from comigs.runs.layout import TRACK
from comigs.runs.track.curves import Row
from comigs.runs.track.tracker import Subject, Tracker

FOLDER = f"{TRACK}/wandb"
PRIVATE = {  # what wandb writes of itself: programs, code, packages, the machine, its user, output
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "disable_job_creation": True,
    "email": "",
    "host": "",
    "label_disable": True,
    "program": "",
    "save_code": False,
    "symlink": False,
    "username": "",
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_disable_viewer": True,
    "x_executable": "",
    "x_save_requirements": False,
}
PATIENCE = {"init_timeout": 20.0, "finish_timeout": 60.0, "login_timeout": 1.0}  # seconds


class Log:
    """A log is one run of wandb's, whose steps are the numbers of our rows.

    Offline, wandb cannot go on with a run: each start would make a part of it, of which the server
    keeps the last one that is sent, and a killed process leaves nothing of its own part. So each
    start writes the whole run again. Online, the server says which row it lacks first.
    """

    def __init__(self, run: Any, files: Any) -> None:
        self.run, self.files = run, files
        run.define_metric("*", step_metric="round")
        self._forget_logs()

    def write(self, rows: Sequence[Row]) -> None:
        """Write the rows that the run does not have yet."""
        for row in rows:
            if row.number >= self.run.starting_step:
                figures = {f"{row.of}/{name}": value for name, value in row.figures.items()}
                self.run.log(figures | {"round": row.round}, step=row.number)

    def close(self, finished: bool) -> None:
        """End the run; online, this waits for what is on its way."""
        self.run.finish(exit_code=0 if finished else 1)
        self._forget_logs()

    def _forget_logs(self) -> None:
        """Remove what wandb notes of itself beside a run: it is full of paths."""
        for name in self.files.names(FOLDER):
            self.files.remove_folder(f"{FOLDER}/{name}/logs")


def _open(subject: Subject) -> Log:
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    # Nobody is asked for a key while a run goes on.
    online = _is_online()
    if online and not (wandb.api.api_key or os.environ.get("WANDB_IDENTITY_TOKEN_FILE")):
        raise PermissionError("no API key; run: wandb login")

    # What an earlier start has written is written again, or is on the server.
    subject.files.make_folder(TRACK)
    subject.files.remove_folder(FOLDER)
    mode = "online" if online else "offline"
    private = wandb.Settings(mode=mode, silent=True, **PRIVATE, **PATIENCE)
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "comigs"),
            id=subject.id,
            name=subject.name,
            config=subject.settings,
            dir=subject.files.path.absolute() / TRACK,
            resume="allow" if online else None,
            settings=private,
        )
    # What is left of the attempt would be in the way of the next one.
    except Exception:
        wandb.teardown(exit_code=1)
        subject.files.remove_folder(FOLDER)
        raise
    return Log(run, subject.files)


def _is_online() -> bool:
    return os.environ.get("WANDB_MODE") == "online"


def _place() -> str:
    return "online" if _is_online() else f"{FOLDER} of the run folder"


TRACKER = Tracker(("wandb",), _place, _open)
