"""Ctrl-C ends a run as Ctrl-C, wherever it arrives."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupts() -> Iterator[None]:
    """What ends in here after an interrupt ends by KeyboardInterrupt.

    A signal that arrives while C++ calls Python raises there, and the C++ may make another error of it: safetensors'
    load_file then says "could not determine the shape of object".
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
