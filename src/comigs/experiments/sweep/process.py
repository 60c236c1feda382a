"""This module runs `comigs` commands as processes of their own.

One run cannot harm another that way, and all cores are used.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from typing import IO

from comigs.processes import Child


def start(words: list[str], environment: dict[str, str], errors: IO[bytes]) -> Child:
    """Start `comigs WORDS`. It goes on where this process is killed."""
    quiet = subprocess.DEVNULL
    return Child("comigs", words, env=environment, stdout=quiet, stderr=errors)


class Command:
    """A command is one `comigs WORDS` that runs.

    threads: the CPU threads that it may use; None: as torch finds them. errors: all that it wrote
    to stderr, once it has ended.
    """

    def __init__(self, words: list[str], threads: int | None = None) -> None:
        self.words = words
        self.errors = ""
        self.began = time.monotonic()
        # a pipe would fill up, and the command wait
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        environment = dict(os.environ)
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        self._process = start(words, environment, self._errors)

    @property
    def elapsed(self) -> float:
        """Seconds since the command began."""
        return time.monotonic() - self.began

    def ended(self) -> bool:
        """Return whether the command runs no more."""
        if self._process.poll() is None:
            return False
        self.wait()
        return True

    def wait(self) -> None:
        """Wait until the command has ended."""
        self._process.wait()
        if not self._errors.closed:
            self._errors.seek(0)
            self.errors = self._errors.read().decode("utf-8", "replace").strip()
            self._errors.close()

    def stop(self) -> None:
        """Ask the command to end, as Ctrl-C would: a run keeps its whole rounds.

        SIGINT would not do, as shells make background jobs ignore it.
        """
        self._process.terminate()

    def kill(self) -> None:
        """End the command at once; a run folder bears it."""
        self._process.kill()

    def problem(self) -> str:
        """Return why the ended command failed, in one line; "" where it did not."""
        code = self._process.returncode
        if code == 0:
            return ""
        if code is not None and code < 0:
            hint = ", perhaps for want of memory" if -code == signal.SIGKILL else ""
            return f"killed by {signal.Signals(-code).name}{hint}"
        line = self.errors.rpartition("\n")[2].removeprefix("error: ").removeprefix("stopped: ")
        return line or f"ended with exit code {code}"
