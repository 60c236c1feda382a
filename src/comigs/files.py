"""Files are written whole or not at all, and what a file system refuses is said in one line."""

from __future__ import annotations

import errno
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from comigs.errors import UserError

ELSEWHERE = "choose another folder with --out"


def command(verb: str, path: Path) -> str:
    """Return a command that can be pasted into a shell, as `comigs resume 'my runs/a'`."""
    return f"comigs {verb} {shlex.quote(str(path))}"


def cache_folder() -> Path:
    """Return the folder of what was unpacked or compiled: $COMIGS_CACHE, else ~/.cache/comigs."""
    return Path(os.environ.get("COMIGS_CACHE", Path.home() / ".cache" / "comigs"))


def require_free(path: Path) -> None:
    """Raise UserError where something is at `path` already, or nothing can be made there."""
    with writing(path, ELSEWHERE):
        if os.path.lexists(path):
            raise UserError(
                f"{path}: exists already; nothing was changed. "
                f"Go on with: {command('resume', path)}, or {ELSEWHERE}"
            )

        # whether the folder can be made is decided where its path begins to be missing
        parent = next(p for p in path.absolute().parents if p.exists())
        if not parent.is_dir():
            raise UserError(f"{path}: {parent} is a file, not a folder; {ELSEWHERE}")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@contextmanager
def writing(folder: Path, advice: str) -> Iterator[None]:
    """Turn an OSError of what writes below `folder` into a UserError that ends with `advice`."""
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
    """Let `write` fill a file beside `path`, then put that file in the place of `path` in one step.

    A kill at any moment leaves the old file or the new one, never a part. Raises OSError.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        write(unfinished)
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files into a folder, which may be new: each of them whole, in their order.

    Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_whole(folder / name, partial(_fill, content))


def _fill(content: bytes, file: Path) -> None:
    file.write_bytes(content)
