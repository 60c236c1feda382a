"""The run folder (docs/run-folder.md): everything a run leaves behind, to be resumed from.

`checkpoint.json` is the commit point: it is replaced in one step after everything it names is on
the disk, so a kill at any moment leaves the last whole round, and at most the current round is done
again.

Tensors go by a path without a round (clients/fr/experts). What is staged is a new file, and belongs
to the run from the next commit on; files of clients that were idle stay as they are.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from comigs.config import Config, load_config, read_toml, relative, to_toml
from comigs.errors import UserError
from comigs.files import ClosedFolder, command, move_new, require_free, writing
from comigs.processes import locked
from comigs.runs.checkpoint import (
    RESTORE,
    Checkpoint,
    file_of,
    read_checkpoint,
    sha256,
    write_tensors,
)
from comigs.runs.json_lines import parse_json, read_lines, read_record, to_lines
from comigs.runs.layout import (
    LOCK,
    METRICS,
    PERSONAL,
    SCRATCH,
    SUFFIX,
    TIMINGS,
    remove_left,
    require_run,
)
from comigs.runs.metrics import Line, Summary, Timing
from comigs.runs.reader import ALLOW, ANYBODY, Reader


class RunFolder:
    """A run on disk is opened with `create` or `open`.

    As a context it is locked against a second writer. scratch: a folder that goes with `commit`.
    """

    def __init__(self, path: Path, reader: Reader = ANYBODY) -> None:
        self.path = path
        self.scratch = path / SCRATCH
        self.files = ClosedFolder(path)
        self.reader = reader
        self._lock = ExitStack()
        self._last: Checkpoint | None = None  # as this writer left it; None: read it from the disk
        self._digest = hashlib.sha256()  # of metrics.jsonl up to `_last`
        self._staged: dict[str, tuple[str, str]] = {}  # path -> its file and sha256

    @classmethod
    def create(cls, path: Path, config: Config, environment: Mapping[str, Any]) -> RunFolder:
        """Make a new run folder at round 0, which appears whole.

        Raises Taken where there is something already, and UserError.
        """
        require_free(path)
        reader = Reader(allow_code=True, cache=config.data.cache)
        with writing(path.parent, "choose another folder with --out"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
                made = cls(Path(scratch) / "run", reader)
                made.path.mkdir()
                # Paths are relative, so that a run and its text can move together and no path of
                # this machine is passed on.
                made._write_text("config.toml", to_toml(relative(config, path)))
                made._write_text("env.json", json.dumps(environment, indent=1))
                for name in (METRICS, TIMINGS):
                    (made.path / name).touch()
                files = {METRICS: sha256(made.files.reading(METRICS))}
                start = Checkpoint(
                    round=0, finished=False, metrics_bytes=0, timings_bytes=0, files=files
                )
                made._write_checkpoint(start)
                move_new(made.path, path)
        return cls(path, reader)

    @classmethod
    def open(cls, path: Path, reader: Reader = ANYBODY) -> RunFolder:
        """Open an existing run, which somebody else may have made.

        reader: what whoever opens it says. Raises UserError where it is no run.
        """
        opened = cls(path, reader)
        require_run(opened.files)
        return opened

    def __enter__(self) -> Self:
        taken = f"{self.path}: another process is working on this run; wait for it or stop it"
        with self._writing():
            self._lock.enter_context(locked(self.path / LOCK, taken))
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def config(self) -> Config:
        """Read the resolved config of the run, as the reader lets it have its way."""
        # Where base.tokenizer is missing, SmolLM2 was read by GPT-2's rule (decision 14).
        path, overrides = self.files.plain("config.toml"), []
        base = read_toml(path).get("base", {})
        if base.get("name") == "smollm2-135m" and "tokenizer" not in base:
            overrides.append('base.tokenizer="gpt-2"')
        return self.reader.read(load_config(path, overrides, own=False), self.path)

    def summary(self) -> Summary:
        """Read the result (summary.json). Raises UserError where the run is not finished."""
        if not self.files.has("summary.json"):
            raise UserError(
                f"{self.path}: not finished; go on with: {command('resume', self.path)}"
            )
        values = self._read_json("summary.json")
        return read_record(Summary, values, str(self.path / "summary.json"))

    def words(self) -> list[str]:
        """Return what the run's reader says, for another process: see `Reader.of`."""
        return [str(self.config().data.cache), *[ALLOW] * self.reader.allow_code]

    def environment(self) -> dict[str, Any]:
        """Read what the run was made with (env.json)."""
        return self._read_json("env.json")

    def checkpoint(self) -> Checkpoint:
        """Read the last commit. Raises UserError where the file is damaged."""
        return read_checkpoint(self._read_json("checkpoint.json"), self.path / "checkpoint.json")

    def metrics(self) -> list[Line]:
        """Read the committed lines of metrics.jsonl. Raises UserError where the file is damaged."""
        raw = self.files.read(METRICS)[: self.checkpoint().metrics_bytes]
        try:
            return read_lines(raw, str(self.path / METRICS))
        except UserError:
            raise UserError(f"{self.path / METRICS}: damaged; {RESTORE}") from None

    def require_a_round(self) -> None:
        """Require a whole round: before it there is no model, which is a UserError."""
        if self.checkpoint().round == 0:
            again = command("resume", self.path)
            raise UserError(f"{self.path}: no round is finished yet; go on with: {again}")

    def rewind(self) -> Checkpoint:
        """Drop what a killed process wrote after the last commit, and return that commit.

        Raises UserError where the run's lines are not those that were committed.
        """
        # Nothing is dropped before it is known that what stays is whole.
        last = self.checkpoint()
        lengths = {METRICS: last.metrics_bytes, TIMINGS: last.timings_bytes}
        for name, length in lengths.items():
            file = self.path / name
            if not self.files.has(name) or file.stat().st_size < length:
                raise UserError(f"{file}: shorter than when round {last.round} ended; {RESTORE}")
        digest = hashlib.sha256(self.files.read(METRICS)[: last.metrics_bytes])
        if digest.hexdigest() != last.files.get(METRICS):
            changed = f"changed since round {last.round} ended"
            raise UserError(f"{self.path / METRICS}: damaged ({changed}); {RESTORE}")
        # Only names that a run gives are removed: the folder may hold somebody's own files, too.
        with self._writing():
            for name, length in lengths.items():
                self.files.truncate(name, length)
            self.files.remove_folder(SCRATCH)
            remove_left(self.files, last.files)
        self._last, self._digest, self._staged = last, digest, {}
        return last

    def stage(self, path: str, tensors: Mapping[str, Tensor], round: int) -> None:
        """Write tensors to the disk, to become the newest of `path` with the next commit.

        path: such as clients/fr/experts. Raises UserError where the disk refuses.
        """
        last = self._last or self.rewind()
        file = file_of(path, round)
        assert file not in last.files, f"{file} is part of the run already"
        with self._writing():
            self.files.write(file, lambda unfinished: write_tensors(unfinished, tensors))
            self._staged[path] = file, sha256(self.files.reading(file))

    def staged(self, prefix: str) -> dict[str, tuple[str, str]]:
        """Return what was staged since the last commit below clients/fr/: path -> file, sha256."""
        return {path: where for path, where in self._staged.items() if path.startswith(prefix)}

    def take(self, staged: Mapping[str, tuple[str, str]]) -> None:
        """Take what another process of this run staged as staged here."""
        self._staged |= {path: (file, digest) for path, (file, digest) in staged.items()}

    def discard(self, prefix: str) -> None:
        """Remove what was staged below a path since the last commit."""
        for path in self.staged(prefix):
            self.files.remove(self._staged.pop(path)[0])

    def follow(self) -> None:
        """See the run as it is on the disk: for a process beside the one that commits."""
        self._last, self._staged = self.checkpoint(), {}

    def commit(
        self, round: int, metrics: Iterable[Line], timings: Iterable[Timing], finished: bool = False
    ) -> None:
        """Make a round's outcome, with what was staged, the point to resume from.

        finished: of all tensors only clients' personal models are kept. Raises UserError where the
        disk refuses; the last commit then stays what it was.
        """
        # Where this fails, whatever comes next rewinds first.
        last, self._last = self._last or self.rewind(), None
        raw, digest = to_lines(metrics), self._digest.copy()
        digest.update(raw)

        # A path that was not staged keeps its file, which is neither read nor hashed again.
        newest = {path: (file, last.files[file]) for path, file in last.newest.items()}
        newest |= self._staged
        kept = [of for path, of in newest.items() if not finished or path.endswith(f"/{PERSONAL}")]
        files = dict(sorted(kept))
        files[METRICS] = digest.hexdigest()

        # The checkpoint is the last to be written and the first to be believed: what it does not
        # name any more is removed after it.
        with self._writing():
            timings_bytes = self.files.append(TIMINGS, to_lines(timings))
            metrics_bytes = self.files.append(METRICS, raw)
            now = Checkpoint(
                round=round,
                finished=finished,
                metrics_bytes=metrics_bytes,
                timings_bytes=timings_bytes,
                files=files,
            )
            self._write_checkpoint(now)
            for file in {*last.files, *(file for file, _ in newest.values())} - files.keys():
                self.files.remove(file)
            self.files.remove_folder(SCRATCH)
        self._last, self._digest, self._staged = now, digest, {}

    def holds(self, path: str, staged: bool = False) -> bool:
        """Return whether there is something to load from that path."""
        return path in (self._last or self.checkpoint()).newest or (staged and path in self._staged)

    def load(self, path: str, staged: bool = False) -> dict[str, Tensor]:
        """Load the newest tensors of a path, mapped into memory: as committed, or staged since.

        Raises UserError where the file is missing or is not, byte for byte, what was written.
        """
        last = self._last or self.checkpoint()
        file = last.newest.get(path, f"{path}{SUFFIX}")
        expected = last.files.get(file)
        if staged and path in self._staged:
            file, expected = self._staged[path]
        try:
            if expected is None or sha256(self.files.reading(file)) != expected:
                raise UserError(
                    f"{self.path / file}: damaged or not of this run "
                    f"(its sha256 is not the committed one); {RESTORE}"
                )
            return load_file(self.files.plain(file))
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{self.path / file}: cannot be read: {reason}; {RESTORE}") from None

    def write_summary(self, summary: Summary) -> None:
        """Write summary.json, whole. Raises UserError where the disk refuses."""
        text = json.dumps(summary.as_json(), indent=1, allow_nan=False) + "\n"
        with self._writing():
            self._write_text("summary.json", text)

    def _writing(self) -> AbstractContextManager[None]:
        again = command("resume", self.path)
        return writing(self.path, f"make room or allow writing, then go on with: {again}")

    def _write_checkpoint(self, checkpoint: Checkpoint) -> None:
        self._write_text("checkpoint.json", json.dumps(checkpoint.as_json(), indent=1))

    def _write_text(self, name: str, text: str) -> None:
        self.files.write(name, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))

    def _read_json(self, name: str) -> dict[str, Any]:
        try:
            content = parse_json(self.files.read(name))
        except UserError:
            raise
        except (OSError, ValueError):
            content = None
        if not isinstance(content, dict):
            raise UserError(f"{self.path / name}: damaged or missing; {RESTORE}")
        return content
