"""This module runs the programs of a federation's server or of a device. They end with this
process however it ends, all end when one does, and none is restarted behind anybody's back.
"""

from __future__ import annotations

import logging
import os
import queue
import re
import signal
import subprocess
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
from comigs.federation.security.private_files import make_private
from comigs.processes import GRACE, Child
from comigs.text import brief

LOG_BYTES, OLD_LOGS = 5_000_000, 2  # of one program
LINE, LONGEST = 2000, 1 << 20  # characters of a line in a log, and of one that is read at once
START_SECONDS = 120  # for a program to be ready, on a busy machine, too
COLOR = re.compile(r"\x1b\[[0-9;]*m")
OnLine = Callable[[str], None]


@dataclass(frozen=True)
class Program:
    """A program that was started. `last` holds its newest lines of output."""

    name: str
    process: Child
    last: deque[str] = field(default_factory=lambda: deque(maxlen=20))


class Supervisor:
    """A supervisor holds programs; use it as a context, at whose end all of them have ended. The
    output of each goes to `folder`/NAME.log.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str], working_folder: Path) -> None:
        make_private(folder)
        self._folder = folder
        self._environment = environment
        self._working_folder = working_folder
        self._running: list[tuple[Program, threading.Thread]] = []
        self._ended: queue.Queue[Program] = queue.Queue()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # Who was started last needs the others, and so ends first.
        for program, waiter in reversed(self._running):
            program.process.stop()
            waiter.join()

    def start(self, name: str, words: list[str], on_line: OnLine | None = None) -> Program:
        """Start what `words` begin with (see Child), with the rest of them; return the program.

        on_line: called with each line that the program prints.
        """
        # All that it prints comes through one pipe, to its log and to whoever listens.
        process = Child(
            words[0],
            words[1:],
            GRACE,
            cwd=self._working_folder,
            env=dict(self._environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        program = Program(name, process)
        reader = threading.Thread(target=self._read, args=(program, on_line), daemon=True)
        waiter = threading.Thread(target=self._wait, args=(program, reader), daemon=True)
        # It is known before its threads run, so that it is stopped whatever happens next.
        self._running.append((program, waiter))
        reader.start()
        waiter.start()
        return program

    def ended(self, timeout: float) -> Program | None:
        """Return a program that has ended, or None where none does within `timeout` seconds."""
        try:
            return self._ended.get(timeout=timeout)
        except queue.Empty:
            return None

    def _read(self, program: Program, on_line: OnLine | None) -> None:
        log = RotatingFileHandler(
            self._folder / f"{program.name}.log", maxBytes=LOG_BYTES, backupCount=OLD_LOGS
        )
        assert program.process.stdout is not None
        with closing(log), program.process.stdout as lines:
            # What a stranger has sent may be in a line, so it is shown as text, and has an end.
            while raw := lines.readline(LONGEST):
                line = brief(COLOR.sub("", raw.rstrip()), LINE)
                program.last.append(line)
                log.emit(logging.LogRecord(program.name, logging.INFO, "", 0, line, (), None))
                if on_line is not None:
                    on_line(line)

    def _wait(self, program: Program, reader: threading.Thread) -> None:
        program.process.wait()
        _end_session(program.process.pid)
        reader.join(1)  # its last words; its own children may hold the pipe for longer
        self._ended.put(program)


def _end_session(leader: int) -> None:
    """End what a program started and left behind, as Flower leaves its apps, which try for minutes
    to reach who is gone.
    """
    with suppress(ProcessLookupError, PermissionError):  # nobody of the session is left
        end = time.monotonic() + GRACE
        while time.monotonic() < end:
            os.killpg(leader, 0)
            time.sleep(0.1)
        os.killpg(leader, signal.SIGKILL)


def problem(gone: Program) -> UserError:
    """Return why a program has ended, which none should. Its last line is for people where it says
    so with EX_NOPERM.
    """
    said = next((line for line in reversed(gone.last) if line.strip()), "nothing")
    code = gone.process.returncode
    if code == os.EX_NOPERM:
        return UserError(said)
    return UserError(f"{gone.name} ended with code {code}, so all is stopped. It said last: {said}")


def wait_until(
    ready: Callable[[], bool], name: str, programs: Supervisor, seconds: float = START_SECONDS
) -> None:
    """Wait until a program is ready. Raises UserError where one ends, or it takes too long."""
    end = time.monotonic() + seconds
    while not ready():
        if (gone := programs.ended(timeout=0.2)) is not None:
            raise problem(gone)
        if time.monotonic() > end:
            raise UserError(f"{name}: not ready after {seconds:.0f} s; look into its log")


def keep(programs: Supervisor) -> NoReturn:
    """Wait until a program ends, and raise UserError."""
    while (gone := programs.ended(timeout=3600)) is None:
        pass
    raise problem(gone)
