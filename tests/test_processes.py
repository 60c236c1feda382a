"""Ctrl-C is Ctrl-C, also where a library makes another error of it; a lock has one holder; a child
ends with its parent; memory that is freed goes back to the system.
"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import psutil
import pytest

from comigs.errors import UserError
from comigs.processes import Child, interrupts, is_locked, locked
from tests.conftest import until
from tests.kills import begin
from tests.runs import copied_run, refused


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


def test_a_lock_file_keeps_what_it_holds_and_is_let_go_by_a_killed_process(tmp_path):
    file = tmp_path / "lock"
    file.write_text("mine")
    ready = tmp_path / "ready"

    def work():
        with locked(file, "taken"):
            ready.touch()
            signal.pause()

    child = begin(work)
    until(ready.exists)
    assert is_locked(file)
    with pytest.raises(UserError, match=r"^taken$"), locked(file, "taken"):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with locked(file, "taken"):
        assert file.read_text() == "mine"


def test_a_lock_file_that_is_a_link_is_refused_and_what_it_leads_to_left_alone(tmp_path):
    (tmp_path / "target").write_text("precious")
    (tmp_path / "lock").symlink_to("target")
    for taken in ("taken", None):
        with pytest.raises(UserError, match="symbolic link"), locked(tmp_path / "lock", taken):
            pass
    assert (tmp_path / "target").read_text() == "precious"


def test_a_run_folder_whose_lock_is_a_link_is_refused_in_one_line(tmp_path, capsys):
    run = copied_run(tmp_path)
    (tmp_path / "target").write_text("precious")
    (run / ".lock").unlink(missing_ok=True)
    (run / ".lock").symlink_to(tmp_path / "target")
    assert "symbolic link" in refused(capsys, "resume", run)
    assert (tmp_path / "target").read_text() == "precious"


def test_nobody_holds_a_lock_file_that_is_not_there(tmp_path):
    assert not is_locked(tmp_path / "lock")
    assert not (tmp_path / "lock").exists()


def test_a_child_goes_on_without_its_parent_only_where_it_is_told_to(tmp_path):
    def work(grace):
        child = Child("signal:pause", [], grace)
        (tmp_path / "pid").write_text(str(child.pid))
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)

    for grace, stays in ((None, True), (0.0, False)):
        os.waitpid(begin(lambda grace=grace: work(grace)), 0)
        child = psutil.Process(int((tmp_path / "pid").read_text()))
        with suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
            child.wait(1.5 if stays else 20)
        assert child.is_running() is stays
        if stays:
            child.kill()


HOLES = """
import numpy, psutil
from comigs.processes import LARGE, SMALLER, free_at_once

free_at_once({size})
kept, freed = [], []
for _ in range(200):
    freed.append(numpy.ones(150_000, dtype=numpy.float32))
    kept.append(numpy.ones(10_000, dtype=numpy.float32))
before = psutil.Process().memory_info().rss
del freed
print(before - psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's heap is what it is about")
@pytest.mark.parametrize(("size", "freed"), [("SMALLER", 1.0), ("LARGE", 0.0)])
def test_what_is_freed_between_what_is_kept_goes_back_to_the_system(size, freed):
    """200 blocks of 600 kB are freed, between blocks of 40 kB that stay."""
    script = HOLES.format(size=size)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert int(done.stdout) == pytest.approx(freed * 200 * 600e3, abs=10e6)


def test_more_files_may_be_open_where_the_system_lets_them(tmp_path):
    code = (
        "import resource as r; from comigs.processes import allow_files;"
        "limits = lambda: r.getrlimit(r.RLIMIT_NOFILE);"
        "r.setrlimit(r.RLIMIT_NOFILE, (256, 1000)); allow_files(500); print(*limits());"
        "allow_files(300); print(*limits()); allow_files(2000); print(*limits())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:3] == ["500 1000"] * 3
