"""This module runs what a plan leaves to do, some runs at once, each a process of its own."""

from __future__ import annotations

import shlex
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from comigs import text as f
from comigs.errors import Stopped, UserError
from comigs.experiments.sweep.plan import Plan, Run, one_per_text, write_copy
from comigs.experiments.sweep.process import Command
from comigs.experiments.sweep.progress import Progress
from comigs.experiments.sweep.state import busy, look
from comigs.files import ClosedFolder
from comigs.processes import cpus
from comigs.text import Say

POLL = 0.2  # seconds between looks at the processes
LOG = "sweep.log"  # in the sweep's folder: all that failed runs had to say


def show(plan: Plan, jobs: int, say: Say) -> None:
    """Say what `run_sweep` would do."""
    progress = Progress(plan, jobs, say)
    progress.announce()
    progress.list_runs()


def run_sweep(plan: Plan, jobs: int, say: Say, again: str) -> dict[str, str]:
    """Do all that is left of a plan, and return why runs failed, by label.

    jobs: runs at once. again: the command to go on with. Raises UserError before the first run
    starts where text or base are unusable, and Stopped after Ctrl-C, once all processes have ended.
    """
    progress = Progress(plan, jobs, say, again)
    progress.announce()
    with _stopping(progress):
        # what is wrong for everybody is said before the first of many hours
        _check_texts(progress)
        write_copy(plan)

        # a run that ends makes room for the next one, whichever of them it was
        estimated = bool(progress.left())
        while progress.waiting or progress.running:
            while progress.waiting and len(progress.running) < jobs:
                _begin(progress, progress.waiting.popleft())
            time.sleep(POLL)
            for run, command in list(progress.running):
                if command.ended():
                    progress.running.remove((run, command))
                    if command.problem():
                        _log(plan, command)
                    progress.ended(run, command, command.problem())
            estimated = estimated or progress.first_estimate()
    return progress.failed


def threads(run: Run, jobs: int) -> int | None:
    """Return the CPU threads of a run's process, one of `jobs` on this machine.

    None: as torch finds them, for a run that has the machine for itself and whose config says
    nothing.
    """
    if jobs == 1 or run.config.base.threads is not None:
        return run.config.base.threads
    return max(1, cpus() // (jobs * run.config.workers))


def _begin(progress: Progress, run: Run) -> None:
    """Start or resume a run, or say why not."""
    # meanwhile somebody else may have put something there or finished the run
    try:
        state = look(run.path, run.config)
    except UserError as error:
        progress.ended(run, None, str(error))
        return
    progress.states[run.label] = state
    if state.finished:
        progress.ended(run, None, "")
        return

    # or works on it just now: it may be done by the time all others are
    if busy(run.path):
        if run.label not in progress.deferred:
            progress.deferred.add(run.label)
            progress.waiting.append(run)
            return
        problem = f"another process is working on it; when it is done, go on with: {progress.again}"
        progress.ended(run, None, problem)
        return

    own = threads(run, progress.jobs)
    if state.begun:
        words = ["resume", str(run.path), "--quiet", *_own_say(run)]
    else:
        words = [*run.words("run", own), "--quiet", "--out", str(run.path)]
    progress.running.append((run, Command(words, own)))


def _check_texts(progress: Progress) -> None:
    """Prepare each text once before any run, so that no two runs tokenise it at once.

    A run to resume checks for itself that its text is what it was. Raises UserError.
    """
    runs = one_per_text([r for r in progress.waiting if not progress.states[r.label].begun])
    if runs:
        progress.say(f"preparing {f.plural(len(runs), 'text')}")
    for run in runs:
        command = Command(run.words("prepare"))
        progress.running.append((run, command))  # to be stopped like a run
        command.wait()
        progress.running.clear()
        if command.problem():
            raise UserError(f"{progress.plan.file}: {run.label}: {command.problem()}")


@contextmanager
def _stopping(progress: Progress) -> Iterator[None]:
    """Leave no process behind, whatever ends the context.

    A second Ctrl-C kills the processes. Raises Stopped after Ctrl-C.
    """
    stopped = Stopped(f"every whole round of every run is kept; go on with: {progress.again}")

    # a closed terminal counts as Ctrl-C, but not under nohup
    before = signal.getsignal(signal.SIGHUP)
    if before == signal.SIG_DFL:
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        raise stopped from None
    finally:
        # all are asked first: they end their rounds side by side
        try:
            for _, command in progress.running:
                command.stop()
            for _, command in progress.running:
                command.wait()
        except KeyboardInterrupt:
            for _, command in progress.running:
                command.kill()
            raise stopped from None
        finally:
            signal.signal(signal.SIGHUP, before)


def _own_say(run: Run) -> list[str]:
    """Return what a run's folder cannot say by itself, from the sweep, which is the user's own."""
    words = ["--cache", str(run.config.data.cache)]
    if "." in run.config.method:
        words.append("--allow-code")
    return words


def _log(plan: Plan, command: Command) -> None:
    """Keep all that a failed run wrote: its one line may not be enough to find a bug of ours."""
    said = f"$ {shlex.join(['comigs', *command.words])}\n{command.errors}\n\n"
    ClosedFolder(plan.folder).append(LOG, said.encode(errors="replace"))
