"""Run a program of Flower or a function of ours in this process, for as long as the process that
started us lives.

python -m comigs.federation.parent_watchdog PROGRAM ARGUMENTS...

PROGRAM: a console script, as flower-superlink, or package.module:function. Our standard input is a
pipe from whoever started us: it closes when they end, also by kill -9, and then we end, too, and
with us the apps that Flower started.
"""

from __future__ import annotations

import atexit
import json
import os
import pkgutil
import signal
import sys
import threading
import time
from contextlib import suppress
from importlib.metadata import entry_points
from typing import Any

END = "\x1e"  # ASCII's record separator
GRACE = 5  # seconds for a clean end, once the pipe is closed


def program(name: str) -> Any:
    """The function behind a console script's name or package.module:function."""
    if ":" in name:
        return pkgutil.resolve_name(name)
    return entry_points(group="console_scripts")[name].load()


def call(words: list[str]) -> None:
    """Be this program."""
    name, *sys.argv[1:] = words
    sys.argv[0] = name  # Flower's programs look at it
    sys.exit(program(name)())


def call_each() -> None:
    """Be one program after the other: command lines as JSON on the standard input, END after the
    output of each.
    """
    for words in json.load(sys.stdin):
        with suppress(SystemExit):
            call(words)
        print(END, flush=True)


def _watch() -> None:
    while os.read(0, 1024):
        pass
    atexit.register(_end_group)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    _end_group()
    os._exit(1)


def _end_group() -> None:
    """Us, and what we started: an app of Flower that is only interrupted tries for minutes to reach
    who is gone.
    """
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=_watch, daemon=True).start()
    call(sys.argv[1:])
