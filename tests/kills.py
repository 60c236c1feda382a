"""Killing a process at each moment at which it touches a folder, as `kill -9` would: nothing of it
runs any more.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

from safetensors.torch import save, save_file

TOUCHES = {"open", "os.rename", "os.remove", "os.truncate", "os.mkdir", "os.rmdir"}  # audit events


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def begin(work: Callable[[], object]) -> int:
    """Run `work` in a forked child, which has torch already; returns its process id."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # of forking with threads: nobody holds a lock here
        child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def in_child(work: Callable[[], object]) -> int | None:
    """Run `work` in a forked child: the signal that killed it, or None where it came to its end."""
    _, status = os.waitpid(begin(work), 0)
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0, "the child failed"
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else None


def killed_at(number: int, folder: Path, work: Callable[[], object]) -> bool:
    """Run `work` in a child that kills itself at touch `number` (from 1) of `folder`; False where
    there was none.
    """
    left = number

    def touch() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            kill_self()

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        # what is opened from a folder that is open already goes by a name of its own, or by none
        if event in TOUCHES:
            names = [str(a) for a in arguments[:2]]
            if any(name.startswith(str(folder)) for name in names) or names[0][:1] != "/":
                touch()

    def save_slowly(tensors, path, metadata) -> None:  # what Rust writes raises no audit event
        whole = save(tensors, metadata)
        Path(path).write_bytes(whole[: len(whole) // 2])
        touch()
        save_file(tensors, path, metadata)

    def fsync(file: int) -> None:
        touch()

    def harmed() -> None:
        sys.addaudithook(audit)
        with patch("comigs.runs.checkpoint.save_file", save_slowly), patch("os.fsync", fsync):
            work()

    return in_child(harmed) == signal.SIGKILL
