"""Ctrl-C is Ctrl-C, also where a library makes another error of it."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from comigs.processes import interrupts


@pytest.fixture(autouse=True)
def sigterm_as_in_the_command():
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, before)


def swallow(number):
    """As a library in C++ does it."""
    try:
        os.kill(os.getpid(), number)
    except KeyboardInterrupt:
        raise ValueError("could not determine the shape of object") from None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_error_made_of_an_interrupt_is_an_interrupt_again(number):
    handler = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), interrupts():
        swallow(number)
    assert signal.getsignal(number) is handler


def test_other_errors_stay_what_they_are():
    with pytest.raises(ValueError, match=r"^mine$"), interrupts():
        raise ValueError("mine")


def test_a_thread_has_no_signals_and_may_run_all_the_same():
    done = []

    def work():
        with interrupts():
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done
