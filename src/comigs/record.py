"""The run folder (docs/run-folder.md): everything a run leaves behind, and the point it can be resumed from.

`checkpoint.json` is the commit point: it is replaced in one step after everything it names is on the disk, so a kill
at any moment leaves the last whole round, and at most the current round is done again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from comigs.config import Config, load_config, to_toml
from comigs.errors import UserError
from comigs.files import write_whole, writing

Tensors = Mapping[str, Tensor]
ADVICE = "free or allow it, then go on with: comigs resume {path}"


@dataclass(frozen=True)
class Checkpoint:
    """What checkpoint.json says.

    round: the last whole round, 0 before the first. finished: the last download is in and test is measured.
    metrics_bytes: length of metrics.jsonl up to here. files: sha256 of each tensor file, by path in the run.
    """

    round: int
    finished: bool
    metrics_bytes: int
    files: dict[str, str]


class RunFolder:
    """A run on disk. Open one with `create` or `open`; as a context it is locked against a second writer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = ExitStack()

    @classmethod
    def create(cls, path: Path, config: Config, environment: Mapping[str, Any]) -> RunFolder:
        """A new run folder at round 0. It appears whole. Raises UserError where there is something already."""
        cls.require_absent(path)
        with writing(path.parent, "choose another folder with --out"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
                made = cls(Path(scratch) / "run")
                made.path.mkdir()
                (made.path / "config.toml").write_text(to_toml(config), encoding="utf-8")
                (made.path / "env.json").write_text(json.dumps(environment, indent=1), encoding="utf-8")
                (made.path / "metrics.jsonl").touch()
                (made.path / "timings.jsonl").touch()
                made._write_checkpoint(Checkpoint(0, False, 0, {}))
                made.path.rename(path)
        return cls(path)

    @staticmethod
    def require_absent(path: Path) -> None:
        """Raises UserError where there is something at `path` already."""
        if path.exists():
            raise UserError(
                f"{path}: exists already; nothing was changed. Go on with: comigs resume {path}, "
                "or name another folder with --out"
            )

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run. Raises UserError where it is none."""
        if not (path / "checkpoint.json").is_file() or not (path / "config.toml").is_file():
            raise UserError(f"{path}: not a run folder (it has no config.toml and checkpoint.json)")
        return cls(path)

    def __enter__(self) -> Self:
        with writing(self.path, ADVICE.format(path=self.path)):
            lock = self._lock.enter_context((self.path / ".lock").open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
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
            raise UserError(f"{self.path}: not finished; go on with: comigs resume {self.path}")
        return self._read_json("summary.json")

    def environment(self) -> dict[str, Any]:
        """What the run was made with (env.json)."""
        return self._read_json("env.json")

    def checkpoint(self) -> Checkpoint:
        """The last commit. Raises UserError where the file is damaged."""
        try:
            return Checkpoint(**self._read_json("checkpoint.json"))
        except TypeError:
            raise UserError(
                f"{self.path / 'checkpoint.json'}: damaged; restore it from a copy or start a new run"
            ) from None

    def rewind(self) -> Checkpoint:
        """Drop what a killed process wrote after the last commit; returns that commit."""
        last = self.checkpoint()
        metrics = self.path / "metrics.jsonl"
        if not metrics.is_file() or metrics.stat().st_size < last.metrics_bytes:
            raise UserError(
                f"{metrics}: shorter than when round {last.round} ended; restore it from a copy or start a new run"
            )
        with writing(self.path, ADVICE.format(path=self.path)), metrics.open("rb+") as file:
            file.truncate(last.metrics_bytes)
        self._delete_all_but(last.files)
        return last

    def commit(
        self, round: int, metrics: Iterable[Mapping[str, Any]], timings: Iterable[Mapping[str, Any]],
        tensors: Mapping[str, Tensors], finished: bool = False,
    ) -> None:  # fmt: skip
        """Make a round's outcome the point to resume from. tensors: by path in the run, without ".safetensors".

        Raises UserError where the disk refuses; the last commit then stays what it was.
        """
        with writing(self.path, ADVICE.format(path=self.path)):
            files = {
                f"{name}.safetensors": self._save(f"{name}.safetensors", saved, round)
                for name, saved in tensors.items()
            }
            self._append("timings.jsonl", timings)
            length = self._append("metrics.jsonl", metrics)
            self._write_checkpoint(Checkpoint(round, finished, length, files))
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
                    f"{self.path / file}: damaged or not of this run (its sha256 is not the committed one); "
                    "restore it from a copy or start a new run"
                )
            return load_file(self.path / file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.path / file}: cannot be read: {error}") from None

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write summary.json or the like, whole."""
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        with writing(self.path, ADVICE.format(path=self.path)):
            write_whole(self.path / name, lambda path: path.write_text(text, encoding="utf-8"))

    def metrics(self) -> list[dict[str, Any]]:
        """The committed lines of metrics.jsonl."""
        raw = (self.path / "metrics.jsonl").read_bytes()[: self.checkpoint().metrics_bytes]
        return [json.loads(line) for line in raw.splitlines()]

    def _save(self, name: str, tensors: Tensors, round: int) -> str:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        try:
            write_whole(
                path, lambda unfinished: save_file(whole, unfinished, metadata={"format": "1", "round": str(round)})
            )
        except SafetensorError as error:  # safetensors wraps the operating system's errors
            raise OSError(*_errno_in(str(error))) from None
        return _sha256(path)

    def _append(self, name: str, lines: Iterable[Mapping[str, Any]]) -> int:
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, allow_nan=False) + "\n" for line in lines)
            file.flush()
            return file.tell()

    def _write_checkpoint(self, checkpoint: Checkpoint) -> None:
        text = json.dumps(checkpoint.__dict__, indent=1)
        write_whole(self.path / "checkpoint.json", lambda path: path.write_text(text, encoding="utf-8"))

    def _delete_all_but(self, files: Mapping[str, str]) -> None:
        for path in [*self.path.glob("*/**/*.safetensors*"), *self.path.glob("*/**/.*.unfinished")]:
            if str(path.relative_to(self.path)) not in files:
                path.unlink()

    def _read_json(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            content = None
        if not isinstance(content, dict):
            raise UserError(f"{self.path / name}: damaged or missing; restore it from a copy or start a new run")
        return content


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _errno_in(message: str) -> tuple[int, str]:
    """The operating system's error number inside a safetensors message like "I/O error: ... (os error 28)"."""
    _, _, tail = message.partition("os error ")
    number = tail.rstrip(')" \n')
    return (int(number) if number.isdigit() else 5), message
