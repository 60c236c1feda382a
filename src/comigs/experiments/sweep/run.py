"""Run what a plan leaves to do, some runs at once, each a process of its own, with a line for each
that ends.
"""

from __future__ import annotations

import shlex
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from comigs import text as f
from comigs.errors import Stopped, UserError
from comigs.experiments.sweep.plan import Plan, Run, one_per_text, write_copy
from comigs.experiments.sweep.process import Child
from comigs.experiments.sweep.progress import Progress, Say
from comigs.experiments.sweep.state import busy, look
from comigs.processes import cpus

POLL = 0.2  # seconds between looks at the processes
LOG = "sweep.log"  # in the sweep's folder: all that failed runs had to say


def show(plan: Plan, jobs: int, say: Say) -> None:
    """Say what `run_sweep` would do."""
    board = Progress(plan, jobs, say)
    board.announce()
    board.list_runs()


def run_sweep(plan: Plan, jobs: int, say: Say, again: str) -> dict[str, str]:
    """Do all that is left of a plan; returns why runs failed, by label.

    again: the command to go on with. Raises UserError before the first run starts where text or
    base are unusable, and Stopped after Ctrl-C, once all processes have ended.
    """
    board = Progress(plan, jobs, say, again)
    board.announce()
    with _stopping(board):
        _check_texts(board)
        write_copy(plan)
        known = bool(board.left())
        while board.waiting or board.running:
            while board.waiting and len(board.running) < jobs:
                _begin(board, board.waiting.popleft())
            time.sleep(POLL)
            for run, child in [pair for pair in board.running if pair[1].ended()]:
                board.running.remove((run, child))
                problem = child.problem()
                if problem:
                    _log(plan, child)
                board.ended(run, child, problem)
            known = known or board.first_estimate()
    return board.failed


def threads(run: Run, jobs: int) -> int | None:
    """CPU threads of a run's process where the machine is shared; None: its config says, or it has
    it for itself.
    """
    if jobs == 1 or run.config.base.threads is not None:
        return run.config.base.threads
    return max(1, cpus() // (jobs * run.config.workers))


def _begin(board: Progress, run: Run) -> None:
    """Start or resume a run, unless somebody else works on it, has finished it or put something
    there meanwhile.
    """
    try:
        state = look(run.path, run.config)
    except UserError as error:
        board.ended(run, None, str(error))
        return
    board.states[run.label] = state
    if state.finished:
        board.ended(run, None, "")
        return
    if busy(run.path):
        if run.label in board.deferred:
            board.ended(
                run,
                None,
                f"another process is working on it; when it is done, go on with: {board.again}",
            )
        else:
            board.deferred.add(run.label)
            board.waiting.append(run)
        return
    own = threads(run, board.jobs)
    new = [*run.words("run", own), "--quiet", "--out", str(run.path)]
    words = ["resume", str(run.path), "--quiet"] if state.begun else new
    board.running.append((run, Child(words, own)))


def _check_texts(board: Progress) -> None:
    """Prepare each text once, before any run: what is wrong with it is said now, and no two runs
    tokenise it at once.

    A run to resume checks for itself that its text is what it was.
    """
    runs = one_per_text([run for run in board.waiting if not board.states[run.label].begun])
    if runs:
        board.say(f"preparing {f.plural(len(runs), 'text')}")
    for run in runs:
        child = Child(run.words("prepare"))
        board.running.append((run, child))  # to be stopped like a run
        child.wait()
        board.running.clear()
        if child.problem():
            raise UserError(f"{board.plan.file}: {run.label}: {child.problem()}")


@contextmanager
def _stopping(board: Progress) -> Iterator[None]:
    """Leave no process behind, whatever ends us; a second Ctrl-C kills them. A closed terminal
    counts as Ctrl-C.
    """
    stopped = Stopped(f"every whole round of every run is kept; go on with: {board.again}")
    before = signal.getsignal(signal.SIGHUP)
    if before == signal.SIG_DFL:  # not under nohup
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        raise stopped from None
    finally:
        try:
            for _, child in board.running:
                child.stop()
            for _, child in board.running:
                child.wait()
        except KeyboardInterrupt:
            for _, child in board.running:
                child.kill()
            raise stopped from None
        finally:
            signal.signal(signal.SIGHUP, before)


def _log(plan: Plan, child: Child) -> None:
    """Keep all that a failed run wrote: its one line may not be enough to find a bug of ours."""
    with (plan.folder / LOG).open("a", encoding="utf-8") as file:
        file.write(f"$ {shlex.join(['comigs', *child.words])}\n{child.errors}\n\n")
