"""This module holds what concerns processes: this one as the system sees it, locks between
processes, and children, which run a program each and may end when their parent does.

`python -m comigs.processes PARENT GRACE PROGRAM ARGUMENTS...` is what a `Child` runs.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import os
import pkgutil
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import FileLock, Timeout

from comigs.errors import UserError

GRACE = 5.0  # seconds for a program's clean end, once its parent has ended
PATIENCE = 10.0  # seconds for a child's clean end, once it was asked to
M_MMAP_THRESHOLD = -3  # of glibc
LARGE, SMALLER = 1 << 20, 1 << 18  # bytes of a block of memory
LOOK = 0.1  # seconds between looks at whether the parent is still there


@contextmanager
def interrupts() -> Iterator[None]:
    """Make whatever ends in this context after an interrupt end by KeyboardInterrupt.

    A signal that arrives while C++ calls Python raises there, and the C++ may make another error of
    it: safetensors' load_file then says "could not determine the shape of object".
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    came = False
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers = {number: handler for number, handler in before.items() if callable(handler)}

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        handlers[signal.Signals(number)](number, frame)

    # Whoever handled a signal goes on handling it; we only take note that one came.
    for number in handlers:
        signal.signal(number, note)
    try:
        yield
    except Exception:
        if came:
            raise KeyboardInterrupt from None
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def cpus() -> int:
    """Return how many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_memory() -> int:
    """Return how many bytes of memory this process has had at most so far."""
    # getrusage begins with what the process had that started this one; /proc does not.
    status = Path("/proc/self/status")
    if status.exists():
        peak = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(encoding="utf-8"), re.MULTILINE)
        if peak:
            return int(peak[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def allow_files(number: int) -> None:
    """Let this process have so many files open, where it may: Linux gives 1024 at first, macOS
    256.
    """
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if now < number and (most == resource.RLIM_INFINITY or most >= number):
        resource.setrlimit(resource.RLIMIT_NOFILE, (number, most))


def free_at_once(size: int = LARGE) -> None:
    """Give blocks of memory of this size back to the system as soon as they are freed.

    By itself glibc keeps them for what comes, in a heap that grows by a half beyond what is used.
    Where another library is, nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, size)


@contextmanager
def locked(file: Path, taken: str | None = None) -> Iterator[None]:
    """Hold a lock file, which a process that is killed lets go of. What the file holds stays.

    taken: what the UserError says where somebody else holds the lock; None: wait for them. Raises
    UserError where the file is a link, and OSError where it cannot be opened.
    """
    # A soft lock, where the file system has no other, would outlive a process that is killed.
    lock = FileLock(file, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire(blocking=taken is None)
    except Timeout:
        raise UserError(taken or "") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{file}: a symbolic link, and so no lock file; remove it") from None
        raise
    try:
        yield
    finally:
        lock.release()


def is_locked(file: Path) -> bool:
    """Return whether somebody holds a lock file. One that we may not open counts as free."""
    if not file.exists():
        return False
    try:
        with locked(file, "taken"):
            return False
    except PermissionError:
        return False
    except UserError:
        return True


class Child(subprocess.Popen[str]):
    """A child runs one program of Python, in a session of its own: a Ctrl-C at our terminal reaches
    it through this process only.
    """

    def __init__(
        self, program: str, words: Sequence[str], grace: float | None = None, **settings: Any
    ) -> None:
        """Start `program`, a console script's name or package.module:function, with these words.

        grace: seconds for the child's clean end once this process has ended, however it ended; 0:
        it ends at once; None: it goes on. settings: as in Popen.
        """
        parent = 0 if grace is None else os.getpid()
        # -P: the working folder is not searched for modules, as for the console script itself.
        line = [sys.executable, "-P", "-m", "comigs.processes", str(parent), str(grace or 0)]
        settings = {"stdin": subprocess.DEVNULL, "start_new_session": True, **settings}
        self.began = time.monotonic()
        super().__init__([*line, program, *words], text=True, errors="replace", **settings)

    @property
    def elapsed(self) -> float:
        """Seconds since the child was started."""
        return time.monotonic() - self.began

    def stop(self) -> None:
        """Ask the child to end, and make it end where it takes too long."""
        self.terminate()
        try:
            self.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()


def end_with_parent(parent: int, before: Callable[[], object] = lambda: None) -> None:
    """End this process soon after its parent has ended, however that ended.

    parent: the parent's process id. before: called in a thread before the end, once the parent is
    gone.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK)
        before()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def call(program: str, words: Sequence[str]) -> None:
    """Be a program, a console script's name or package.module:function, until it exits."""
    sys.argv = [program, *words]  # Flower's programs look at their own name
    if ":" in program:
        function = pkgutil.resolve_name(program)
    else:
        function = entry_points(group="console_scripts")[program].load()
    sys.exit(function())


def main() -> None:
    """Run `PARENT GRACE PROGRAM ARGUMENTS...`, as a Child does. PARENT 0: nobody is watched."""
    parent, grace, program, *words = sys.argv[1:]
    if parent != "0":
        before = partial(_end_cleanly, float(grace)) if float(grace) else lambda: None
        end_with_parent(int(parent), before)
    call(program, words)


def _end_cleanly(grace: float) -> None:
    """End by a signal, as from a terminal, and within `grace` seconds in any case."""
    atexit.register(_end_session)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace)
    _end_session()


def _end_session() -> None:
    """End this process and what it started: an app of Flower that is only interrupted tries for
    minutes to reach who is gone.
    """
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
