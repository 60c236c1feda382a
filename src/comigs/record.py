"""The run folder (docs/run-folder.md): everything a run leaves behind, and the point it can be resumed from.

`checkpoint.json` is the commit point: it is replaced in one step after everything it names is on the disk, so a kill
at any moment leaves the last whole round, and at most the current round is done again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from comigs.config import Config, load_config, to_toml
from comigs.errors import UserError
from comigs.files import command, require_free, write_whole, writing

Tensors = Mapping[str, Tensor]
METRICS, TIMINGS = "metrics.jsonl", "timings.jsonl"
RESTORE = "restore it from a copy or start a new run"


@dataclass(frozen=True)
class Checkpoint:
    """What checkpoint.json says.

    round: the last whole round, 0 before the first. finished: the last download is in and test is measured.
    metrics_bytes, timings_bytes: lengths of metrics.jsonl and timings.jsonl up to here.
    files: sha256 of each tensor file and of metrics.jsonl up to here, by path in the run.
    """

    round: int
    finished: bool
    metrics_bytes: int
    timings_bytes: int
    files: dict[str, str]

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Checkpoint:
        """Raises TypeError where it is not as above."""
        checkpoint = cls(**values)
        numbers = (checkpoint.round, checkpoint.metrics_bytes, checkpoint.timings_bytes)
        if not all(isinstance(n, int) and n >= 0 for n in numbers) or not isinstance(checkpoint.files, dict):
            raise TypeError
        return checkpoint


class RunFolder:
    """A run on disk. Open one with `create` or `open`; as a context it is locked against a second writer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = ExitStack()

    @classmethod
    def create(cls, path: Path, config: Config, environment: Mapping[str, Any]) -> RunFolder:
        """A new run folder at round 0. It appears whole. Raises UserError where there is something already."""
        require_free(path)
        with writing(path.parent, "choose another folder with --out"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
                made = cls(Path(scratch) / "run")
                made.path.mkdir()
                # relative, so that a run and its text can move together and no path of this machine is passed on
                root = Path(os.path.relpath(config.data.root, path.resolve()))  # behind links, as it is read
                data = config.data.model_copy(update={"root": root})
                _write_text(made.path / "config.toml", to_toml(config.model_copy(update={"data": data})))
                _write_text(made.path / "env.json", json.dumps(environment, indent=1))
                (made.path / METRICS).touch()
                (made.path / TIMINGS).touch()
                made._write_checkpoint(Checkpoint(0, False, 0, 0, {METRICS: _sha256(made.path / METRICS)}))
                made.path.rename(path)
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run. Raises UserError where it is none."""
        if not (path / "checkpoint.json").is_file() or not (path / "config.toml").is_file():
            what = (
                "not a run folder (it has no config.toml and checkpoint.json)"
                if path.exists()
                else "no such run folder"
            )
            raise UserError(f"{path}: {what}; start a run with: comigs run CONFIG")
        return cls(path)

    def __enter__(self) -> Self:
        with self._writing():
            lock = self._lock.enter_context((self.path / ".lock").open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise UserError(f"{self.path}: another process is working on this run; wait for it or stop it") from None
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def config(self) -> Config:
        """The resolved config of the run."""
        return load_config(self.path / "config.toml")

    def summary(self) -> dict[str, Any]:
        """The result (summary.json). Raises UserError where the run is not finished."""
        if not (self.path / "summary.json").exists():
            raise UserError(f"{self.path}: not finished; go on with: {command('resume', self.path)}")
        return self._read_json("summary.json")

    def environment(self) -> dict[str, Any]:
        """What the run was made with (env.json)."""
        return self._read_json("env.json")

    def checkpoint(self) -> Checkpoint:
        """The last commit. Raises UserError where the file is damaged."""
        try:
            return Checkpoint.parse(self._read_json("checkpoint.json"))
        except TypeError:
            raise UserError(f"{self.path / 'checkpoint.json'}: damaged; {RESTORE}") from None

    def require_a_round(self) -> None:
        """Raises UserError where no round is finished yet, so that there is no model."""
        if self.checkpoint().round == 0:
            raise UserError(f"{self.path}: no round is finished yet; go on with: {command('resume', self.path)}")

    def rewind(self) -> Checkpoint:
        """Drop what a killed process wrote after the last commit; returns that commit."""
        last = self.checkpoint()
        lengths = {METRICS: last.metrics_bytes, TIMINGS: last.timings_bytes}
        for name, length in lengths.items():
            file = self.path / name
            if not file.is_file() or file.stat().st_size < length:
                raise UserError(f"{file}: shorter than when round {last.round} ended; {RESTORE}")
        if hashlib.sha256(self._committed_metrics(last)).hexdigest() != last.files.get(METRICS):
            raise UserError(f"{self.path / METRICS}: damaged (changed since round {last.round} ended); {RESTORE}")
        with self._writing():
            for name, length in lengths.items():
                os.truncate(self.path / name, length)
            self._delete_all_but(last.files)
        return last

    def commit(
        self, round: int, metrics: Iterable[Mapping[str, Any]], timings: Iterable[Mapping[str, Any]],
        tensors: Mapping[str, Tensors], finished: bool = False,
    ) -> None:  # fmt: skip
        """Make a round's outcome the point to resume from. tensors: by path in the run, without ".safetensors".

        Raises UserError where the disk refuses; the last commit then stays what it was.
        """
        with self._writing():
            files = {f"{name}.safetensors": self._save(f"{name}.safetensors", saved) for name, saved in tensors.items()}
            timings_bytes, metrics_bytes = self._append(TIMINGS, timings), self._append(METRICS, metrics)
            files[METRICS] = _sha256(self.path / METRICS)
            self._write_checkpoint(Checkpoint(round, finished, metrics_bytes, timings_bytes, files))
            self._delete_all_but(files)

    def load(self, name: str) -> dict[str, Tensor]:
        """Tensors of the last commit by path in the run, without ".safetensors".

        Raises UserError where the file is missing or is not, byte for byte, what was committed.
        """
        file = f"{name}.safetensors"
        expected = self.checkpoint().files.get(file)
        try:
            if expected is None or _sha256(self.path / file) != expected:
                raise UserError(
                    f"{self.path / file}: damaged or not of this run (its sha256 is not the committed one); {RESTORE}"
                )
            return load_file(self.path / file)
        except (OSError, SafetensorError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"{self.path / file}: cannot be read: {reason}; {RESTORE}") from None

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write summary.json or the like, whole."""
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        with self._writing():
            _write_text(self.path / name, text)

    def metrics(self) -> list[dict[str, Any]]:
        """The committed lines of metrics.jsonl."""
        raw = self._committed_metrics(self.checkpoint())
        try:
            return [json.loads(line) for line in raw.splitlines()]
        except ValueError:
            raise UserError(f"{self.path / METRICS}: damaged; {RESTORE}") from None

    def _committed_metrics(self, last: Checkpoint) -> bytes:
        return (self.path / METRICS).read_bytes()[: last.metrics_bytes]

    def _writing(self) -> AbstractContextManager[None]:
        return writing(self.path, f"make room or allow writing, then go on with: {command('resume', self.path)}")

    def _save(self, name: str, tensors: Tensors) -> str:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        try:  # one key of metadata only: safetensors writes several in any order, and equal runs give equal bytes
            write_whole(path, lambda unfinished: save_file(whole, unfinished, metadata={"comigs": "1"}))
        except SafetensorError as error:  # safetensors wraps the operating system's errors
            raise OSError(*_errno_in(str(error))) from None
        return _sha256(path)

    def _append(self, name: str, lines: Iterable[Mapping[str, Any]]) -> int:
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, allow_nan=False) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
            return file.tell()

    def _write_checkpoint(self, checkpoint: Checkpoint) -> None:
        _write_text(self.path / "checkpoint.json", json.dumps(checkpoint.__dict__, indent=1))

    def _delete_all_but(self, files: Mapping[str, str]) -> None:
        """Tensors of other rounds, and what a killed process was writing."""
        for path in {*self.path.glob("*/**/*.safetensors"), *self.path.glob("**/.*.unfinished")}:
            if str(path.relative_to(self.path)) not in files:
                path.unlink()

    def _read_json(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            content = None
        if not isinstance(content, dict):
            raise UserError(f"{self.path / name}: damaged or missing; {RESTORE}")
        return content


def _write_text(path: Path, text: str) -> None:
    write_whole(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _errno_in(message: str) -> tuple[int, str]:
    """The operating system's error number inside a safetensors message like "I/O error: ... (os error 28)"."""
    _, _, tail = message.partition("os error ")
    number = tail.rstrip(')" \n')
    return (int(number) if number.isdigit() else 5), message
