"""TensorBoard: event files in the run folder, a folder for each client and one for the server."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from comigs.files import ClosedFolder
from comigs.runs.layout import TRACK
from comigs.runs.track.curves import Row
from comigs.runs.track.tracker import Subject, Tracker

FOLDER = f"{TRACK}/tensorboard"
LARGEST = 3.4e38  # what an event holds is a float32


class Events:
    """Events are appended to files of their own, as each start of a run makes new ones.

    TensorBoard's own writer would put the host's name into the name of the file.
    """

    def __init__(self, files: ClosedFolder) -> None:
        self.files = files
        self.known: dict[str, set[tuple[str, int]]] = {}  # by folder: name and step of figures
        self.open: dict[str, Any] = {}
        self._closing = ExitStack()

    def write(self, rows: Sequence[Row]) -> None:
        """Append an event for each row, of those figures that are not in any file."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        for row in rows:
            if row.of not in self.known:
                self.known[row.of] = set(self._read(row.of))
            values = []
            for name, figure in row.figures.items():
                if (name, row.step) not in self.known[row.of] and abs(figure) <= LARGEST:
                    values.append(Summary.Value(tag=name, simple_value=figure))
            if values:
                self._append(row.of, step=row.step, summary=Summary(value=values))
                self.known[row.of] |= {(value.tag, row.step) for value in values}
        for writer in self.open.values():
            writer.flush()

    def close(self, finished: bool) -> None:
        """Close the files."""
        self._closing.close()

    def _append(self, of: str, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        if of not in self.open:
            self.open[of] = RecordWriter(self._new_file(of))
            self._closing.callback(self.open[of].close)
            self._append(of, file_version="brain.Event:2")
        event = Event(wall_time=time.time(), **content)
        self.open[of].write(event.SerializeToString())

    def _new_file(self, of: str) -> Any:
        """Return a new file whose name comes after those of all files there, as readers want."""
        folder = f"{FOLDER}/{of}"
        self.files.make_folder(folder)
        last = max((_number(name) for name in self.files.names(folder)), default=0)
        name = f"events.out.tfevents.{max(int(time.time()), last + 1):010d}.comigs"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        return os.fdopen(self.files.open(f"{folder}/{name}", flags), "wb")

    def _read(self, of: str) -> Iterator[tuple[str, int]]:
        """Give name and step of every figure that the files of a folder hold."""
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

        for name in self.files.names(f"{FOLDER}/{of}"):
            if _number(name):
                file: Path = self.files.plain(f"{FOLDER}/{of}/{name}")
                for event in LegacyEventFileLoader(str(file)).Load():
                    yield from ((value.tag, event.step) for value in event.summary.value)


def _number(name: str) -> int:
    """Return the number in the name of a file of events, 0 where it is none."""
    found = re.match(r"events\.out\.tfevents\.([0-9]+)\.", name)
    return int(found[1]) if found else 0


def _open(subject: Subject) -> Events:
    return Events(subject.files)


TRACKER = Tracker(("tensorboard",), lambda: f"{FOLDER} of the run folder", _open)
