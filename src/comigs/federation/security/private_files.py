"""This module writes secrets to the disk, where nobody but their owner can read them."""

from __future__ import annotations

import os
from pathlib import Path

from comigs.errors import UserError
from comigs.files import write_whole, writing


def write_private(path: Path, text: str) -> None:
    """Write a whole file that only its owner can read. Raises OSError."""
    write_whole(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"), mode=0o600)


def make_private(folder: Path) -> None:
    """Make a folder that only its owner can open. Raises UserError where it cannot be made or is
    open to others.
    """
    with writing(folder, "choose another folder"):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o077:
            raise UserError(
                f"{folder}: open to other users of this machine; close it with: chmod 700 {folder}"
            )
