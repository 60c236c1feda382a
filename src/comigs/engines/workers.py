"""Processes beside the main one, each with a base of its own, on a GPU of its own where there are
several.

Main and worker talk in lines of JSON over a socket that nobody else has; tensors go by files of the
run folder. A worker ends with the main process, however that ends. No pickle.
"""

from __future__ import annotations

import json
import queue
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from comigs.bases.load import load_base
from comigs.config import Config
from comigs.data.prepare import prepare
from comigs.engines.host import ClientHost
from comigs.engines.upload_store import StoredUpload, UploadStore
from comigs.errors import UserError
from comigs.files import command
from comigs.methods.loading import load_method
from comigs.methods.method import Upload
from comigs.processes import Child, cpus
from comigs.runs.folder import RunFolder
from comigs.runs.json_lines import read_event
from comigs.runs.metrics import Event
from comigs.server.protocol import Reply, Report, Task

Result = TypeVar("Result")
Line = dict[str, Any]
KILLED = -9  # how a process ends when the system is short of memory


def devices(workers: int, device: torch.device) -> list[str]:
    """The device of each worker. Raises UserError where this machine has fewer than there are
    workers.
    """
    if workers == 1:
        return [str(device)]
    gpus = device.type == "cuda"
    there = [f"cuda:{n}" for n in range(torch.cuda.device_count())] if gpus else ["cpu"] * cpus()
    if workers > len(there):
        what = "GPUs" if gpus else "CPU cores"
        raise UserError(
            f"workers: given {workers}, but this machine has {len(there)} {what}; must be 1 to {len(there)}"
        )
    return there[:workers]


class Workers:
    """The processes beside this one. They start when there is something to do for them."""

    def __init__(
        self,
        config: Config,
        device: torch.device,
        folder: RunFolder,
        store: UploadStore,
        report: Report,
    ) -> None:
        """device: this process's own. Raises UserError where there are fewer devices than
        workers.
        """
        self._devices = devices(config.workers, device)
        self._folder, self._spool, self._report = folder, store, report
        self._one_at_a_time = threading.Lock()
        self._beside: list[Worker] = []

    def report(self, event: Event) -> None:
        """Pass an event on, whichever process it is from; one at a time."""
        with self._one_at_a_time:
            self._report(event)

    def parcels(self, tensors: Mapping[str, Upload]) -> dict[str, str]:
        """Files with these tensors, for workers to read, by client; what several get is one
        file.
        """
        if len(self._devices) == 1:
            return {}
        files: dict[int, str] = {}
        for each in tensors.values():
            if id(each) not in files:
                spooled = (
                    each if isinstance(each, StoredUpload) else self._spool.add("parcel", each)
                )
                files[id(each)] = str(spooled.path)
        return {name: files[id(each)] for name, each in tensors.items()}

    def spread(
        self,
        names: Iterable[str],
        here: Callable[[str], Result],
        there: Callable[[Worker, str], Result],
    ) -> dict[str, Result]:
        """Do something for each client, as processes get free. Raises what the first one to fail
        raised.
        """
        order, waiting = list(names), queue.SimpleQueue[str]()
        for name in order:
            waiting.put(name)
        results: dict[str, Result] = {}
        problems: list[Exception] = []

        def work(do: Callable[[str], Result]) -> None:
            try:
                while not problems:
                    name = waiting.get_nowait()
                    results[name] = do(name)
            except queue.Empty:
                pass
            except Exception as problem:
                problems.append(problem)

        def work_beside(worker: Worker) -> None:
            work(lambda name: there(worker, name))

        try:
            threads = [
                threading.Thread(target=work_beside, args=(w,), daemon=True)
                for w in self._ready(len(order))
            ]
            for thread in threads:
                thread.start()
            work(here)
            for thread in threads:
                thread.join()
            if problems:
                raise problems[0]
        except BaseException:
            self.close()
            raise
        return {name: results[name] for name in order}

    def close(self) -> None:
        """End the processes beside this one."""
        for worker in self._beside:
            worker.close()
        self._beside = []

    def _ready(self, tasks: int) -> list[Worker]:
        """As many processes as there is work for beside this one."""
        wanted = min(len(self._devices), tasks)
        for number in range(len(self._beside) + 1, wanted):
            self._beside.append(
                Worker(number, self._devices[number], self._folder, self._spool, self.report)
            )
        return self._beside[: max(0, wanted - 1)]


class Worker:
    """One process, as the main one sees it. number: from 1; the main process is 0."""

    def __init__(
        self, number: int, device: str, folder: RunFolder, store: UploadStore, report: Report
    ) -> None:
        self._number, self._folder, self._spool, self._report = number, folder, store, report
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = Child(
                "comigs.engines.workers:main",
                [str(folder.path), str(number), device, str(theirs.fileno())],
                grace=0,  # it leaves the run alone as soon as this process is gone
                pass_fds=[theirs.fileno()],
                stdout=2,  # what libraries print is no answer
            )
        self._lines = self._socket.makefile("rw", encoding="utf-8")

    def exchange(self, name: str, task: Task, download: str | None) -> Reply:
        """`ClientHost.exchange` there; download: a parcel. Raises what was raised there."""
        said = self._ask(
            {"do": "exchange", "name": name, "task": asdict(task), "download": download}
        )
        self._folder.take(said["staged"])
        upload = None if said["upload"] is None else self._spool.read(Path(said["upload"]))
        return Reply(upload, said["metrics"], said["timing"], said["train_tokens"], said["round"])

    def probe(self, name: str, uploads: Mapping[str, str], round: int) -> dict[str, float]:
        """`ClientHost.probe` there; uploads: parcels. Raises what was raised there."""
        staged = self._folder.staged(f"clients/{name}/")
        asked = {
            "do": "probe",
            "name": name,
            "uploads": dict(uploads),
            "round": round,
            "staged": staged,
        }
        nats: dict[str, float] = self._ask(asked)["nats"]
        return nats

    def close(self) -> None:
        """End it. What it was doing is lost."""
        self._process.kill()
        self._process.wait()
        self._socket.close()

    def _ask(self, question: Line) -> Line:
        try:
            _say(self._lines, question)
            for line in self._lines:
                said: Line = json.loads(line)
                if said["kind"] == "answer":
                    return said
                if said["kind"] == "problem":
                    raise _problem(said)
                event = read_event(said, f"worker {self._number}")
                assert event is not None
                self._report(event)
        except OSError:
            pass  # it has ended
        code = self._process.wait()
        raise UserError(
            f"worker {self._number}: ended with code {code}{' (killed; perhaps memory was short)' * (code == KILLED)}; "
            f"every whole round is kept. Go on with: {command('resume', self._folder.path)} --workers 1"
        )


def _problem(said: Line) -> Exception:
    kinds: dict[str, type[Exception]] = {
        "UserError": UserError,
        "OutOfMemoryError": torch.OutOfMemoryError,
    }
    return kinds.get(said["type"], RuntimeError)(said["text"])


def _say(lines: Any, line: Mapping[str, Any]) -> None:
    lines.write(json.dumps(line) + "\n")
    lines.flush()


class _Desk:
    """A worker's own end: answers one question after the other."""

    def __init__(self, folder: RunFolder, number: str, device: str, report: Report) -> None:
        config = folder.config()
        section = config.base.model_copy(update={"device": device})
        if section.threads is not None:
            torch.set_num_threads(section.threads)
        base = load_base(section)
        self._folder, self._spool = folder, UploadStore(folder.scratch / "uploads" / number)
        data = prepare(config, base.encoder)
        self._bench = ClientHost(
            config, load_method(config), base, data, folder, self._spool, report
        )

    def answer(self, question: Line) -> Line:
        """What the main process gets back."""
        self._folder.follow()
        do: Callable[..., Line] = getattr(self, f"_{question.pop('do')}")
        return do(**question)

    def _exchange(self, name: str, task: Line, download: str | None) -> Line:
        splits = {key: tuple(task[key]) for key in ("evaluate", "evaluate_base")}
        received = {} if download is None else self._spool.read(Path(download))
        reply = self._bench.exchange(name, Task(**{**task, **splits}), received)
        upload = str(reply.upload.path) if isinstance(reply.upload, StoredUpload) else None
        return {
            "upload": upload,
            "metrics": [line.as_json() for line in reply.metrics],
            "timing": reply.timing.as_json(),
            "train_tokens": reply.train_tokens,
            "round": reply.round,
            "staged": self._folder.staged(f"clients/{name}/"),
        }

    def _probe(
        self,
        name: str,
        uploads: Mapping[str, str],
        round: int,
        staged: Mapping[str, tuple[str, str]],
    ) -> Line:
        self._folder.take(staged)
        read = {author: self._spool.read(Path(path)) for author, path in uploads.items()}
        return {"nats": self._bench.probe(name, read, round)}


def main() -> None:
    """RUN NUMBER DEVICE FILE-DESCRIPTOR: be a worker until the socket closes."""
    path, number, device, descriptor = sys.argv[1:]
    lines = socket.socket(fileno=int(descriptor)).makefile("rw", encoding="utf-8")
    desk: _Desk | None = None
    for line in lines:
        try:
            question = json.loads(line)
            if desk is None:
                folder = RunFolder.open(Path(path))
                folder.follow()
                desk = _Desk(folder, number, device, lambda event: _say(lines, event.as_json()))
            _say(lines, {**desk.answer(question), "kind": "answer"})
        except Exception as problem:
            if not isinstance(problem, (UserError, torch.OutOfMemoryError)):
                traceback.print_exc()
            _say(lines, {"kind": "problem", "type": type(problem).__name__, "text": str(problem)})
