"""Programs that run as long as we do: they end with us however we end, and none is restarted behind
anybody's back.
"""

from __future__ import annotations

import logging
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import NoReturn, Self

from comigs.errors import UserError
from comigs.federation.parent_watchdog import GRACE
from comigs.federation.security.private_files import make_private

TETHER = [sys.executable, "-P", "-m", "comigs.federation.parent_watchdog"]
LOG_BYTES, OLD_LOGS = 5_000_000, 2  # of one program
START_SECONDS = 120  # for a program to be ready, on a busy machine, too
PATIENCE = 10  # seconds for a clean end
COLOR = re.compile(r"\x1b\[[0-9;]*m")
OnLine = Callable[[str], None]


@dataclass
class Child:
    """A program that was started. last: its newest lines of output."""

    name: str
    process: subprocess.Popen[str]
    last: deque[str] = field(default_factory=lambda: deque(maxlen=20))

    def stop(self) -> None:
        """Ask it to end, and make it end."""
        self.process.terminate()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()


class Supervisor:
    """Use as a context: all have ended when it does. The output of each goes to
    `folder`/NAME.log.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str], working_folder: Path) -> None:
        make_private(folder)
        self._folder = folder
        self._environment = environment
        self._working_folder = working_folder
        self._running: list[tuple[Child, threading.Thread]] = []
        self._ended: queue.Queue[Child] = queue.Queue()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for child, waiter in reversed(self._running):
            child.stop()
            waiter.join()

    def start(self, name: str, words: list[str], on_line: OnLine | None = None) -> Child:
        """Start a program (see tether.py). on_line: gets each line it prints."""
        process = subprocess.Popen(
            [*TETHER, *words], cwd=self._working_folder, env=dict(self._environment), text=True, errors="replace",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C reaches it through us only
        )  # fmt: skip
        child = Child(name, process)
        reader = threading.Thread(target=self._read, args=(child, on_line), daemon=True)
        waiter = threading.Thread(target=self._wait, args=(child, reader), daemon=True)
        self._running.append((child, waiter))
        reader.start()
        waiter.start()
        return child

    def ended(self, timeout: float) -> Child | None:
        """A program that has ended, waiting for one at most `timeout` seconds."""
        try:
            return self._ended.get(timeout=timeout)
        except queue.Empty:
            return None

    def _read(self, child: Child, on_line: OnLine | None) -> None:
        log = RotatingFileHandler(
            self._folder / f"{child.name}.log", maxBytes=LOG_BYTES, backupCount=OLD_LOGS
        )
        assert child.process.stdout is not None
        with closing(log), child.process.stdout as lines:
            for raw in lines:
                line = COLOR.sub("", raw.rstrip())
                child.last.append(line)
                log.emit(logging.LogRecord(child.name, logging.INFO, "", 0, line, (), None))
                if on_line is not None:
                    on_line(line)

    def _wait(self, child: Child, reader: threading.Thread) -> None:
        child.process.wait()
        _end_group(child.process.pid)
        reader.join(1)  # its last words; its own children may hold the pipe for longer
        assert child.process.stdin is not None
        child.process.stdin.close()
        self._ended.put(child)


def _end_group(leader: int) -> None:
    """What a program started and left behind, as Flower its apps, which try for minutes to reach
    who is gone.
    """
    with suppress(ProcessLookupError, PermissionError):  # nobody of it is left
        end = time.monotonic() + GRACE
        while time.monotonic() < end:
            os.killpg(leader, 0)
            time.sleep(0.1)
        os.killpg(leader, signal.SIGKILL)


def problem(gone: Child) -> UserError:
    """Why a program has ended, which none should. Its last line is for people where it says so with
    EX_NOPERM.
    """
    said = next((line for line in reversed(gone.last) if line.strip()), "nothing")
    if gone.process.returncode == os.EX_NOPERM:
        return UserError(said)
    return UserError(
        f"{gone.name} ended with code {gone.process.returncode}, so all is stopped. It said last: {said}"
    )


def wait_until(
    ready: Callable[[], bool], name: str, children: Supervisor, seconds: float = START_SECONDS
) -> None:
    """Until a program is ready. Raises UserError where one ends, or it takes too long."""
    end = time.monotonic() + seconds
    while not ready():
        if (gone := children.ended(timeout=0.2)) is not None:
            raise problem(gone)
        if time.monotonic() > end:
            raise UserError(f"{name}: not ready after {seconds:.0f} s; look into its log")


def keep(children: Supervisor) -> NoReturn:
    """Until a program ends. Raises UserError."""
    while (gone := children.ended(timeout=3600)) is None:
        pass
    raise problem(gone)
