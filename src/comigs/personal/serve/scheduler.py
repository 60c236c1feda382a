"""Continuous batching: one thread that runs pass after pass, and lets requests join and leave in
between.

A job waits in a queue until there are rows for all its choices. Its prompt is read once, by the row
of its first choice, together with the next token of every row that writes; the other choices then
fork off. A request is heard of after one pass where its prompt fits into `Limits.pass_tokens`, and
no pass is much longer than that.

`transformers` has continuous batching too. It packs rows as we do, but no module learns which row a
token is of, so experts could not follow; and it has one seed for all requests and tells the log
probability of the chosen token alone.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from comigs.personal.serve.jobs import (
    BROKEN,
    BUSY,
    LATE,
    STOPPING,
    Event,
    Failure,
    Job,
    Piece,
    Refused,
    TokenInfo,
)
from comigs.personal.serve.model import RowModel
from comigs.personal.serve.rows import Row, make_pass
from comigs.personal.serve.sampling import choose, log_probabilities
from comigs.personal.serve.text import Transcript, Vocabulary
from comigs.seeds import generator

log = logging.getLogger("comigs.serve")


@dataclass(frozen=True)
class Limits:
    """These are the bounds of a scheduler.

    rows: sequences in one pass at most. queue: jobs that wait at most. pass_tokens: tokens of
    prompts in one pass.
    """

    rows: int = 16
    queue: int = 256
    pass_tokens: int = 512


class Writer:
    """One choice that is being written. feed: tokens that its row has to read before the next can
    be chosen.
    """

    def __init__(self, job: Job, choice: int, row: Row, vocabulary: Vocabulary) -> None:
        self.job = job
        self.row = row
        self.feed: list[int] = list(job.prompt)
        self.transcript = Transcript(vocabulary, choice, job.settings.stop)
        seed = job.settings.seed if job.settings.seed is not None else secrets.randbits(63)
        self.random: np.random.Generator = generator(seed, "serve", str(choice))


class Scheduler:
    """Rows of many jobs in one batch. `start` and `stop` its thread, or call `step` oneself."""

    def __init__(
        self, model: RowModel, vocabulary: Vocabulary, ends: frozenset[int], limits: Limits
    ) -> None:
        """Serve `model`. ends: the tokens that end a text."""
        self.model = model
        self.vocabulary = vocabulary
        self.ends = ends
        self.limits = limits
        self.passes = 0
        self.writers: list[Writer] = []
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._stop_at: float | None = None
        self._thread = threading.Thread(target=self._run, name="comigs-serve", daemon=True)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue all of these jobs or none of them. Raises Refused."""
        with self._changed:
            if self._stop_at is not None:
                raise Refused(STOPPING)
            if len(self._waiting) + len(jobs) > self.limits.queue:
                raise Refused(BUSY)
            self._waiting.extend(jobs)
            self._changed.notify()

    def load(self) -> tuple[int, int]:
        """Return how many rows are writing and how many jobs wait."""
        with self._changed:
            return len(self.writers), len(self._waiting)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """Take nothing more, refuse what waits, and end what runs within so many seconds.

        Returns at once. A second call can only bring the end nearer.
        """
        with self._changed:
            until = time.monotonic() + seconds
            self._stop_at = until if self._stop_at is None else min(until, self._stop_at)
            self._changed.notify()

    def join(self) -> None:
        """Wait for the thread of a stopped scheduler."""
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self.writers and self._stop_at is None:
                    self._changed.wait()
                if not self._waiting and not self.writers:
                    return
            self.step()

    def step(self) -> None:
        """Let jobs join and leave, then run one pass, if there is anything to run."""
        self._drop()
        self._admit()
        if not self.writers:
            return
        try:
            self._pass()
        except Exception:  # whatever is wrong with these rows must not end the others' server
            log.exception("a forward pass failed")
            self._fail(self.writers, BROKEN)

    def _drop(self) -> None:
        """Let go of those that nobody waits for, and of those that are too late."""
        now = time.monotonic()
        # Others put jobs into the queue while this thread works, so the queue is taken as a whole.
        with self._changed:
            stopping = self._stop_at is not None
            over = self._stop_at is not None and now >= self._stop_at
            waiting, self._waiting = list(self._waiting), deque()
            for job in waiting:
                if job.cancelled:
                    continue
                if stopping or now >= job.deadline:
                    job.deliver(STOPPING if stopping else LATE)
                else:
                    self._waiting.append(job)
        # Rows that nobody waits for make room for the queue.
        cancelled = {id(w.job) for w in self.writers if w.job.cancelled}
        self.writers = [w for w in self.writers if id(w.job) not in cancelled]
        self._fail([w for w in self.writers if over], STOPPING)
        self._fail([w for w in self.writers if now >= w.job.deadline], LATE)

    def _fail(self, writers: Sequence[Writer], failure: Failure) -> None:
        """End the jobs of these writers, each told once."""
        jobs = {id(writer.job): writer.job for writer in writers}
        self.writers = [w for w in self.writers if id(w.job) not in jobs]
        for job in jobs.values():
            _deliver(job, failure)

    def _admit(self) -> None:
        """Give rows to those that wait, first come first served, while there are rows for all of a
        job's choices.
        """
        with self._changed:
            taken = self._rows_taken()
            while self._waiting and taken + len(self._waiting[0].choices) <= self.limits.rows:
                job = self._waiting.popleft()
                taken += len(job.choices)
                self.writers.append(Writer(job, job.choices[0], Row(job.client), self.vocabulary))

    def _rows_taken(self) -> int:
        """Return the rows in use; a job whose prompt is being read keeps rows for choices that have
        not forked yet.
        """
        forked = sum(1 for writer in self.writers if writer.transcript.num_tokens)
        return forked + sum(len(w.job.choices) for w in self.writers if not w.transcript.num_tokens)

    def _pass(self) -> None:
        """Run one forward pass and choose a token for every row that has read all it was given."""
        # Who writes reads one token; prompts share what a pass has room for, first come first
        # served.
        left, batch, entries = self.limits.pass_tokens, list[Writer](), []
        for writer in self.writers:
            count = min(len(writer.feed), left) if len(writer.feed) > 1 else 1
            if count == 0:
                continue
            left -= count if len(writer.feed) > 1 else 0
            batch.append(writer)
            entries.append((writer.row, writer.feed[:count]))
            writer.feed = writer.feed[count:]
        this = make_pass(entries)
        logits_BV = self.model.forward(this)
        self.passes += 1
        # The pass has put the rows of a client next to each other.
        place = {id(span.row): number for number, span in enumerate(this.spans)}
        for writer in batch:
            # Its prompt goes on, or its job has failed a moment ago.
            if writer.feed or writer not in self.writers:
                continue
            logits_V = logits_BV[place[id(writer.row)]]
            if not bool(torch.isfinite(logits_V).all()):
                self._fail([writer], BROKEN)
                continue
            for each in [writer, *self._forks(writer)]:
                self._write(each, logits_V)

    def _forks(self, writer: Writer) -> list[Writer]:
        """Return the other choices of a job whose prompt has just been read."""
        if writer.transcript.num_tokens:
            return []
        job = writer.job
        forks = [
            Writer(job, choice, writer.row.fork(), self.vocabulary) for choice in job.choices[1:]
        ]
        self.writers.extend(forks)
        return forks

    def _write(self, writer: Writer, logits_V: Tensor) -> None:
        """Choose the next token of a row, and tell what can be told."""
        settings = writer.job.settings
        # What ends a text is no part of it, and has no log probability to tell.
        token = choose(logits_V, settings, writer.random)
        if token in self.ends:
            self._finish(writer, writer.transcript.end("stop"))
            return
        # The text decides what can be told: half a character waits, and so does half a stop text.
        info = None
        if settings.logprobs is not None:
            info = TokenInfo(
                token, *log_probabilities(logits_V, token, settings.logprobs), offset=0
            )
        piece = writer.transcript.add(token, info)
        if piece.finish is None and writer.transcript.num_tokens >= settings.max_tokens:
            rest = writer.transcript.end("length")
            piece = Piece(
                rest.choice,
                piece.text + rest.text,
                piece.tokens + rest.tokens,
                rest.num_tokens,
                rest.finish,
            )
        if piece.finish is not None:
            self._finish(writer, piece)
            return
        writer.feed = [token]
        if piece.text or piece.tokens:
            _deliver(writer.job, piece)

    def _finish(self, writer: Writer, piece: Piece) -> None:
        self.writers = [w for w in self.writers if w is not writer]
        _deliver(writer.job, piece)


def _deliver(job: Job, event: Event) -> None:
    if not job.cancelled:
        job.deliver(event)
