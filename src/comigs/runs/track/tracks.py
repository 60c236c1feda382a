"""A run tells its trackers what it has committed, and goes on whatever becomes of them."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Self

from comigs.config import Config
from comigs.files import command
from comigs.runs.folder import RunFolder
from comigs.runs.layout import TRACK
from comigs.runs.metrics import Event, Line, Note
from comigs.runs.track.curves import Curves, Row
from comigs.runs.track.settings import settings_of
from comigs.runs.track.tracker import Subject, Writer, load_tracker
from comigs.text import one_line

ID = f"{TRACK}/id"
TRIES = 3  # failures in a row after which a tracker is left alone until the run ends


class Tracks:
    """Tracks are the trackers of one run that is open, from its start to its end: a context.

    A tracker is first given every row of the run, and each leaves out what it has already: so a
    resumed run writes no moment twice and misses none, and so does a tracker that failed in
    between. What goes wrong with one is a note in the run's log and nothing more.
    """

    def __init__(self, config: Config, folder: RunFolder, report: Callable[[Event], None]) -> None:
        self.config, self.folder, self.report = config, folder, report
        self.curves = Curves(config)
        self.writers: dict[str, Writer] = {}
        self.failures: Counter[str] = Counter()

    def __enter__(self) -> Self:
        if self.config.track.to:
            self.write(self.folder.metrics())
        return self

    def write(self, lines: Sequence[Line]) -> None:
        """Tell every tracker lines that were committed just now."""
        rows = self.curves.rows(lines) if self.config.track.to else []
        for name in self.config.track.to:
            if self.failures[name] < TRIES:
                self._tell(name, rows)

    def __exit__(self, kind: object, *_: object) -> None:
        # Whoever was away gets a last chance, unless somebody wants the run to stop at once.
        finished = self.folder.checkpoint().finished if self.config.track.to else False
        for name in self.config.track.to:
            if name not in self.writers and kind is None:
                self._tell(name, ())
            try:
                if writer := self.writers.pop(name, None):
                    writer.close(finished)
            except Exception as error:
                self._failed(name, error)
            if self.failures[name]:
                again = command("resume", self.folder.path)
                self._say(f"{name} lacks a part of this run; when it works again: {again}")

    def _tell(self, name: str, rows: Sequence[Row]) -> None:
        """Give a tracker these rows; where it is not open, open it and give it all there are."""
        try:
            if name not in self.writers:
                self.writers[name] = load_tracker(name).open(self._subject())
                rows = Curves(self.config).rows(self.folder.metrics())
            self.writers[name].write(rows)
            self.failures[name] = 0
        # Trackers are other people's programs, on other people's servers: anything may happen.
        except Exception as error:
            self._failed(name, error)
            with suppress(Exception):
                if writer := self.writers.pop(name, None):
                    writer.close(finished=False)

    def _failed(self, name: str, error: Exception) -> None:
        self.failures[name] += 1
        if self.failures[name] == 1:  # not the same line in every round
            what = one_line(f"{type(error).__name__}: {error}")[:300]
            self._say(f"{name}: {what}; the run goes on without it")

    def _say(self, message: str) -> None:
        self.report(Note(message=f"warning: track.to: {message}", say=True))

    def _subject(self) -> Subject:
        """Return what trackers are told of the run, whose id is drawn when it is first asked."""
        files = self.folder.files
        if not files.has(ID):
            drawn = secrets.token_hex(6)
            files.write(ID, lambda path: path.write_text(drawn, encoding="utf-8"))
        id = files.read(ID).decode("utf-8")
        name = self.folder.path.resolve().name if self.config.track.names else f"comigs-{id}"
        return Subject(id, name, files, settings_of(self.config))
