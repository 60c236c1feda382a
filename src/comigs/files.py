"""Files written whole or not at all, and what a file system refuses said in one line."""

from __future__ import annotations

import errno
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from comigs.errors import UserError


def command(verb: str, path: Path) -> str:
    """`comigs resume 'my runs/a'`: to be pasted into a shell as it is."""
    return f"comigs {verb} {shlex.quote(str(path))}"


def cache_folder() -> Path:
    """Where what was unpacked or compiled once is kept: $COMIGS_CACHE, else ~/.cache/comigs."""
    return Path(os.environ.get("COMIGS_CACHE", Path.home() / ".cache" / "comigs"))


def folder_or_name(name: str, beside: Path) -> str:
    """A folder, given beside `beside` or from here, by its whole path, so that it is found from
    anywhere.

    What has no slash, or is no folder, is a name, and stays as it is.
    """
    found = [
        str(path.resolve()) for path in (beside / name, Path(name)) if "/" in name and path.is_dir()
    ]
    return found[0] if found else name


def require_free(path: Path) -> None:
    """Raises UserError where there is something at `path` already, or nothing can be made there."""
    with writing(path, "choose another folder with --out"):
        if os.path.lexists(path):
            raise UserError(
                f"{path}: exists already; nothing was changed. Go on with: {command('resume', path)}, "
                "or choose another folder with --out"
            )
        parent = next(p for p in path.absolute().parents if p.exists())
        if not parent.is_dir():
            raise UserError(
                f"{path}: {parent} is a file, not a folder; choose another folder with --out"
            )
        if not os.access(parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@contextmanager
def writing(folder: Path, advice: str) -> Iterator[None]:
    """Turn errors of writing below `folder` into UserErrors that end with `advice`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            problem = "no space left on the disk"
        elif isinstance(error, PermissionError) or error.errno == errno.EROFS:
            problem = "no permission to write here"
        else:
            problem = f"cannot be written: {error.strerror or error}"
        raise UserError(f"{folder}: {problem}; {advice}") from None


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, put it on the disk, then move it into place in one
    step.

    A kill at any moment leaves the old file or the new one. Raises OSError.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        write(unfinished)
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
