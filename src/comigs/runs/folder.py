"""The run folder (docs/run-folder.md): everything a run leaves behind, and the point it can be
resumed from.

`checkpoint.json` is the commit point: it is replaced in one step after everything it names is on
the disk, so a kill at any moment leaves the last whole round, and at most the current round is done
again.

Tensors go by a path without a round (clients/fr/experts). What is staged is a new file, and belongs
to the run from the next commit on; files of clients that were idle stay as they are.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from comigs.config import Config, load_config, to_toml
from comigs.errors import UserError
from comigs.files import command, require_free, write_whole, writing
from comigs.processes import locked

Tensors = Mapping[str, Tensor]
METRICS, TIMINGS = "metrics.jsonl", "timings.jsonl"
SUFFIX = ".safetensors"
PERSONAL = "personal"  # the one name that has no round: it is written once, at the end
OWN = ("", "clients/*/", "server/")  # where a run has its files; whatever else is in its folder is somebody's
LEFT = re.compile(rf"(round-\d{{4,}}\.\w+|{PERSONAL})\{SUFFIX}|\..*\.unfinished")  # what a killed process may leave
RESTORE = "restore it from a copy or start a new run"


@dataclass(frozen=True)
class Checkpoint:
    """What checkpoint.json says.

    round: the last whole round, 0 before the first. finished: the last download is in and test is
    measured.
    metrics_bytes, timings_bytes: lengths of metrics.jsonl and timings.jsonl up to here.
    files: sha256 of the newest tensor files and of metrics.jsonl up to here, by file in the run.
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

    @cached_property
    def newest(self) -> dict[str, str]:
        """clients/fr/experts -> its file in the run."""
        return {_without_round(file): file for file in self.files if file.endswith(SUFFIX)}


class RunFolder:
    """A run on disk. Open one with `create` or `open`; as a context it is locked against a second
    writer.

    scratch: a folder for what is needed until the next commit only; `commit` and `rewind` remove
    it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.scratch = path / ".scratch"
        self._lock = ExitStack()
        self._last: Checkpoint | None = None  # as this writer left it; None: read it from the disk
        self._digest = hashlib.sha256()  # of metrics.jsonl up to `_last`
        self._staged: dict[str, tuple[str, str]] = {}  # path -> its file and sha256

    @classmethod
    def create(cls, path: Path, config: Config, environment: Mapping[str, Any]) -> RunFolder:
        """A new run folder at round 0. It appears whole. Raises UserError where there is something
        already.
        """
        require_free(path)
        with writing(path.parent, "choose another folder with --out"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
                made = cls(Path(scratch) / "run")
                made.path.mkdir()
                # relative, so that a run and its text can move together and no path of this machine
                # is passed on
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
            found = "not a run folder (it has no config.toml and checkpoint.json)"
            what = found if path.exists() else "no such run folder"
            raise UserError(f"{path}: {what}; start a run with: comigs run CONFIG")
        return cls(path)

    def __enter__(self) -> Self:
        taken = f"{self.path}: another process is working on this run; wait for it or stop it"
        with self._writing():
            self._lock.enter_context(locked(self.path / ".lock", taken))
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
        digest = hashlib.sha256((self.path / METRICS).read_bytes()[: last.metrics_bytes])
        if digest.hexdigest() != last.files.get(METRICS):
            raise UserError(f"{self.path / METRICS}: damaged (changed since round {last.round} ended); {RESTORE}")
        with self._writing():
            for name, length in lengths.items():
                os.truncate(self.path / name, length)
            shutil.rmtree(self.scratch, ignore_errors=True)
            for path in (path for folder in OWN for path in self.path.glob(f"{folder}*")):
                if LEFT.fullmatch(path.name) and str(path.relative_to(self.path)) not in last.files:
                    path.unlink()
        self._last, self._digest, self._staged = last, digest, {}
        return last

    def stage(self, path: str, tensors: Tensors, round: int) -> None:
        """Write tensors to the disk, to become the newest of `path` (clients/fr/experts) with the
        next commit.

        Raises UserError where the disk refuses.
        """
        last = self._last or self.rewind()
        parent, _, name = path.rpartition("/")
        file = f"{parent}/{name if name == PERSONAL else f'round-{round:04d}.{name}'}{SUFFIX}"
        assert file not in last.files, f"{file} is part of the run already"
        with self._writing():
            (self.path / parent).mkdir(parents=True, exist_ok=True)
            write_whole(self.path / file, lambda unfinished: write_tensors(unfinished, tensors))
            self._staged[path] = file, _sha256(self.path / file)

    def staged(self, prefix: str) -> dict[str, tuple[str, str]]:
        """What was staged since the last commit, below a path (clients/fr/): path -> its file and
        sha256.
        """
        return {path: where for path, where in self._staged.items() if path.startswith(prefix)}

    def take(self, staged: Mapping[str, tuple[str, str]]) -> None:
        """Count what another process of this run staged as staged here."""
        self._staged |= {path: (file, sha256) for path, (file, sha256) in staged.items()}

    def follow(self) -> None:
        """See the run as it is on the disk: for a process beside the one that commits."""
        self._last, self._staged = self.checkpoint(), {}

    def commit(
        self, round: int, metrics: Iterable[Mapping[str, Any]], timings: Iterable[Mapping[str, Any]],
        finished: bool = False,
    ) -> None:  # fmt: skip
        """Make a round's outcome, with what was staged since the last one, the point to resume
        from.

        finished: of all tensors only clients' personal models are kept. Raises UserError where the
        disk refuses; the last commit then stays what it was.
        """
        last, raw = self._last or self.rewind(), _json_lines(metrics)
        self._last = None  # where this fails, whatever comes next rewinds first
        (digest := self._digest.copy()).update(raw)
        newest = {path: (file, last.files[file]) for path, file in last.newest.items()} | self._staged
        kept = {path: of for path, of in newest.items() if not finished or path.endswith(f"/{PERSONAL}")}
        files = dict(sorted(kept.values())) | {METRICS: digest.hexdigest()}
        with self._writing():
            timings_bytes, metrics_bytes = self._append(TIMINGS, _json_lines(timings)), self._append(METRICS, raw)
            now = Checkpoint(round, finished, metrics_bytes, timings_bytes, files)
            self._write_checkpoint(now)
            for file in {*last.files, *(file for file, _ in newest.values())} - files.keys():
                (self.path / file).unlink(missing_ok=True)
            shutil.rmtree(self.scratch, ignore_errors=True)
        self._last, self._digest, self._staged = now, digest, {}

    def holds(self, path: str, staged: bool = False) -> bool:
        """There is something to load from that path."""
        return path in (self._last or self.checkpoint()).newest or (staged and path in self._staged)

    def load(self, path: str, staged: bool = False) -> dict[str, Tensor]:
        """The newest tensors of a path (clients/fr/experts), mapped into memory: as committed, or
        staged since then.

        Raises UserError where the file is missing or is not, byte for byte, what was written.
        """
        last = self._last or self.checkpoint()
        file = last.newest.get(path, f"{path}{SUFFIX}")
        expected = last.files.get(file)
        if staged and path in self._staged:
            file, expected = self._staged[path]
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
        raw = (self.path / METRICS).read_bytes()
        try:
            return [json.loads(line) for line in raw[: self.checkpoint().metrics_bytes].splitlines()]
        except ValueError:
            raise UserError(f"{self.path / METRICS}: damaged; {RESTORE}") from None

    def _writing(self) -> AbstractContextManager[None]:
        return writing(self.path, f"make room or allow writing, then go on with: {command('resume', self.path)}")

    def _append(self, name: str, raw: bytes) -> int:
        with (self.path / name).open("ab") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
            return file.tell()

    def _write_checkpoint(self, checkpoint: Checkpoint) -> None:
        _write_text(self.path / "checkpoint.json", json.dumps(asdict(checkpoint), indent=1))

    def _read_json(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            content = None
        if not isinstance(content, dict):
            raise UserError(f"{self.path / name}: damaged or missing; {RESTORE}")
        return content


def write_tensors(path: Path, tensors: Tensors) -> None:
    """A safetensors file. Raises OSError."""
    whole = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    try:  # one key of metadata only: safetensors writes several in any order, and equal runs give equal bytes
        save_file(whole, path, metadata={"comigs": "1"})
    except SafetensorError as error:  # the operating system's errors are in there, as "... (os error 28)"
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error)) from None


def _without_round(file: str) -> str:
    """clients/fr/round-0003.experts.safetensors -> clients/fr/experts."""
    parent, _, name = file.removesuffix(SUFFIX).rpartition("/")
    return f"{parent}/{re.sub(r'^round-[0-9]+[.]', '', name)}"


def _json_lines(lines: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode()


def _write_text(path: Path, text: str) -> None:
    write_whole(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
