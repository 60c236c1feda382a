"""Secrets on the disk, and folders that one process at a time may use."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from comigs.errors import UserError
from comigs.files import write_whole, writing


def write_private(path: Path, text: str) -> None:
    """Write a file whole that only its owner can read. Raises OSError."""

    def write(unfinished: Path) -> None:
        unfinished.touch(mode=0o600)
        unfinished.write_text(text, encoding="utf-8")

    write_whole(path, write)


def make_private(folder: Path) -> None:
    """A folder that only its owner can open. Raises UserError where it cannot be made or is open to
    others.
    """
    with writing(folder, "choose another folder"):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o077:
            raise UserError(
                f"{folder}: open to other users of this machine; close it with: chmod 700 {folder}"
            )


@contextmanager
def sole(lock: Path, problem: str) -> Iterator[None]:
    """Be the only one who holds this lock file. Raises UserError(problem) where another process
    does.
    """
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(problem) from None
        yield


def held(lock: Path) -> bool:
    """A process holds this lock file."""
    try:
        with sole(lock, "held"):
            return False
    except UserError:
        return True
