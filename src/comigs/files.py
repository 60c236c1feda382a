"""Files are written whole or not at all, and what a file system refuses is said in one line."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import secrets
import shlex
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from io import BufferedReader
from pathlib import Path, PurePosixPath

from comigs.errors import UserError

# Seconds without a write, after which what is in the making is taken to be a killed process's.
ABANDONED_AFTER = 24 * 3600
ELSEWHERE = "choose another folder with --out"
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
UNFOLLOWED = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # nor does a pipe make anybody wait


def command(verb: str, path: Path) -> str:
    """Return a command that can be pasted into a shell, as `comigs resume 'my runs/a'`."""
    return f"comigs {verb} {shlex.quote(str(path))}"


def cache_folder() -> Path:
    """Return the folder of what was unpacked or compiled: $COMIGS_CACHE, else ~/.cache/comigs."""
    return Path(os.environ.get("COMIGS_CACHE", Path.home() / ".cache" / "comigs"))


class Taken(UserError):
    """Something is already where something new was to be made."""


def require_free(path: Path) -> None:
    """Raise Taken where something is at `path` already, UserError where nothing can be made."""
    with writing(path, ELSEWHERE):
        if os.path.lexists(path):
            raise Taken(
                f"{path}: exists already; nothing was changed. "
                f"Go on with: {command('resume', path)}, or {ELSEWHERE}"
            )
    require_parent(path, ELSEWHERE)


def require_parent(path: Path, advice: str) -> None:
    """Raise UserError, which ends with `advice`, where nothing can be made at `path`."""
    # whether a folder can be made is decided where its path begins to be missing
    with writing(path, advice):
        parent = next(p for p in path.absolute().parents if p.exists())
        if not parent.is_dir():
            raise UserError(f"{path}: {parent} is a file, not a folder; {advice}")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def move_new(made: Path, path: Path) -> None:
    """Move a folder to its place. Raises Taken where somebody else was faster, and OSError."""
    try:
        made.rename(path)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            require_free(path)
        raise


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


def flush(file: int) -> None:
    """Wait until what was written to an open file is on the disk. Raises OSError."""
    whole = getattr(fcntl, "F_FULLFSYNC", None)  # without it macOS leaves it in the disk's cache
    if whole is not None:
        with suppress(OSError):  # a file system may have no word for it
            fcntl.fcntl(file, whole)
            return
    os.fsync(file)


def write_whole(path: Path, write: Callable[[Path], object], mode: int = 0o666) -> None:
    """Let `write` fill a file beside `path`, then put that file in the place of `path` in one step.

    A kill at any moment leaves the old file or the new one, never a part, and once this returns, a
    loss of power leaves the new one. What a kill leaves beside it is removed by who writes the same
    file a day later. mode: of the new file, as in os.open. Raises OSError.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.{16 * '[0-9a-f]'}.unfinished"):
        with suppress(OSError):  # its owner has just finished it
            if time.time() - left.lstat().st_mtime > ABANDONED_AFTER:
                left.unlink()

    # Nobody can have put a file or a link there before: nobody knows the name, and it must be new.
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}.unfinished")
    os.close(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | UNFOLLOWED, mode))
    try:
        write(unfinished)
        with unfinished.open("rb+") as file:
            flush(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)

    # The file is on the disk; that it has this name now is the folder's to say.
    folder = os.open(path.parent, FOLDER)
    try:
        with suppress(OSError):  # a file system may have no word for it
            flush(folder)
    finally:
        os.close(folder)


def write_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files into a folder, which may be new: each of them whole, in their order.

    Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_whole(folder / name, partial(_fill, content))


def _fill(content: bytes, file: Path) -> None:
    file.write_bytes(content)


class ClosedFolder:
    """A closed folder may be somebody else's work, so no link in it leads out of it.

    Its files go by their names from the folder on, as clients/fr/personal.safetensors. The folder
    itself is what the user says, and may be behind a link. Every method raises UserError where a
    link is on the way, and OSError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, name: str, flags: int = os.O_RDONLY) -> int:
        """Return the descriptor of a plain file. flags: as in os.open.

        Raises OSError where it is no plain file, UserError where it is to be written and has
        another name elsewhere.
        """
        with self._parent(name) as (parent, last):
            descriptor = os.open(last, flags | UNFOLLOWED, 0o666, dir_fd=parent)

        # what is no file could make us wait, as a pipe, or never end, as a device
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            os.close(descriptor)
            number = errno.EISDIR if stat.S_ISDIR(found.st_mode) else errno.EINVAL
            raise OSError(number, os.strerror(number), str(self.path / name))

        # what is written to a file with two names is written under the other name, too
        if flags & (os.O_WRONLY | os.O_RDWR) and found.st_nlink > 1:
            os.close(descriptor)
            raise UserError(
                f"{self.path / name}: has another name elsewhere (a hard link), where it would be "
                "changed, too; put a copy in its place"
            )
        return descriptor

    def reading(self, name: str) -> BufferedReader:
        """Open a file to be read; the caller closes it."""
        return os.fdopen(self.open(name), "rb")

    def read(self, name: str) -> bytes:
        """Return what a file holds."""
        with self.reading(name) as file:
            return file.read()

    def plain(self, name: str) -> Path:
        """Return the path of a plain file, for a library that opens files by their paths."""
        os.close(self.open(name))
        return self.path / name

    def has(self, name: str) -> bool:
        """Return whether there is such a file."""
        try:
            self.plain(name)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return False
        return True

    def names(self, folder: str = "") -> list[str]:
        """Return what is in a folder, in order; nothing where there is no such folder."""
        try:
            with self._folder(PurePosixPath(folder).parts) as opened:
                return sorted(os.listdir(opened))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def append(self, name: str, raw: bytes) -> int:
        """Put bytes at the end of a file and on the disk, and return the file's length."""
        with os.fdopen(self.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab") as file:
            file.write(raw)
            file.flush()
            flush(file.fileno())
            return file.tell()

    def truncate(self, name: str, length: int) -> None:
        """Cut a file to its first bytes."""
        descriptor = self.open(name, os.O_WRONLY)
        try:
            os.truncate(descriptor, length)
        finally:
            os.close(descriptor)

    def write(self, name: str, write: Callable[[Path], object]) -> None:
        """Write a file whole, as `write_whole` does. Folders on the way are made."""
        with self._parent(name, make=True):
            write_whole(self.path / name, write)

    def make_folder(self, name: str) -> None:
        """Make a folder, and those on the way to it, where there is none."""
        with self._folder(PurePosixPath(name).parts, make=True):
            pass

    def remove(self, name: str) -> None:
        """Remove a file where there is one; of a link only the link is removed."""
        *folders, last = PurePosixPath(name).parts
        with suppress(FileNotFoundError, NotADirectoryError), self._folder(folders) as parent:
            os.unlink(last, dir_fd=parent)

    def remove_folder(self, name: str) -> None:
        """Remove a folder and what is in it, as far as the system lets us."""
        with suppress(FileNotFoundError), self._parent(name) as (parent, last):
            shutil.rmtree(last, ignore_errors=True, dir_fd=parent)

    def refuse_link(self, name: str) -> None:
        """Raise UserError where a name is that of a link."""
        with self._parent(name):
            pass

    @contextmanager
    def _parent(self, name: str, make: bool = False) -> Iterator[tuple[int, str]]:
        """Open the folder that a file is in: give its descriptor, and the file's name there."""
        *folders, last = PurePosixPath(name).parts
        with self._folder(folders, make) as parent:
            self._refuse_link([*folders, last], parent)
            yield parent, last

    @contextmanager
    def _folder(self, parts: Sequence[str], make: bool = False) -> Iterator[int]:
        """Open a folder, and give its descriptor.

        make: folders that are not there are made. An OSError says the whole path.
        """
        if ".." in parts or "/" in parts:
            raise UserError(f"{self.path}: {'/'.join(parts)} leads out of it")

        # each folder is opened from the one before it, so that what was looked at is what is used
        folder = os.open(self.path, FOLDER)
        try:
            for depth, part in enumerate(parts, start=1):
                self._refuse_link(parts[:depth], folder)
                if make:
                    with suppress(FileExistsError):
                        os.mkdir(part, dir_fd=folder)
                inner = os.open(part, FOLDER | os.O_NOFOLLOW, dir_fd=folder)
                os.close(folder)
                folder = inner
            yield folder
        except OSError as error:
            error.filename = str(self.path.joinpath(*parts, error.filename or ""))
            raise
        finally:
            os.close(folder)

    def _refuse_link(self, parts: Sequence[str], parent: int) -> None:
        """Raise UserError where the last part is a link in the folder before it, which is open."""
        with suppress(FileNotFoundError):
            if stat.S_ISLNK(os.stat(parts[-1], dir_fd=parent, follow_symlinks=False).st_mode):
                raise UserError(
                    f"{self.path.joinpath(*parts)}: a symbolic link, and none is followed inside "
                    f"{self.path}; put what it leads to in its place, or remove it"
                )
