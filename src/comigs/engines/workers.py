"""Workers are processes beside the main one, each with a base, and a GPU where there are several.

Main process and worker talk in lines of JSON over a socket that nobody else has; tensors go by
files of the run folder. A worker ends with the main process, however that ends. No pickle.
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
from comigs.client.workplace import workplace
from comigs.config import Config
from comigs.data.prepare import prepare
from comigs.engines.host import ClientHost
from comigs.engines.upload_store import StoredUpload, UploadStore
from comigs.errors import UserError
from comigs.files import command
from comigs.methods.loading import load_method
from comigs.methods.method import Upload
from comigs.privacy.budget import BudgetSpent
from comigs.processes import Child, cpus
from comigs.runs.environment import require_same_base
from comigs.runs.folder import RunFolder
from comigs.runs.json_lines import read_event
from comigs.runs.metrics import Event
from comigs.runs.reader import Reader
from comigs.server.protocol import Reply, Report, Task

Result = TypeVar("Result")
Line = dict[str, Any]
KNOWN = (UserError, BudgetSpent, torch.OutOfMemoryError)  # what is raised here as it was there
KILLED = -9  # how a process ends when the system is short of memory


def devices(workers: int, device: torch.device) -> list[str]:
    """Return the device of each worker. Raises UserError where this machine has fewer."""
    if workers == 1:
        return [str(device)]
    there, what = ["cpu"] * cpus(), "CPU cores"
    if device.type == "cuda":  # the first worker is this process, whose base is there already
        every = sorted(range(torch.cuda.device_count()), key=lambda n: n != (device.index or 0))
        there, what = [f"cuda:{number}" for number in every], "GPUs"
    if workers > len(there):
        raise UserError(
            f"workers: given {workers}, but this machine has {len(there)} {what}; "
            f"must be 1 to {len(there)}"
        )
    return there[:workers]


class Workers:
    """The workers are all processes of a run. Those beside this one start when there is something
    to do for them.
    """

    def __init__(
        self,
        config: Config,
        own: torch.device,
        folder: RunFolder,
        store: UploadStore,
        report: Report,
    ) -> None:
        """Plan the processes; `own` is this one's device. Raises UserError where there are fewer
        devices than workers.
        """
        self._devices = devices(config.workers, own)
        self._folder, self._store, self._report = folder, store, report
        self._one_at_a_time = threading.Lock()
        self._beside: list[Worker] = []

    def report(self, event: Event) -> None:
        """Report an event, whichever process it is from; one at a time."""
        with self._one_at_a_time:
            self._report(event)

    def parcels(self, tensors: Mapping[str, Upload]) -> dict[str, str]:
        """Return files with these tensors, for workers to read, by client; what several get is one
        file.
        """
        if len(self._devices) == 1:
            return {}
        # Most methods give one and the same download to everybody.
        files: dict[int, str] = {}
        for each in tensors.values():
            if id(each) not in files:
                stored = each
                if not isinstance(stored, StoredUpload):
                    stored = self._store.add("parcel", each)
                files[id(each)] = str(stored.path)
        return {name: files[id(each)] for name, each in tensors.items()}

    def spread(
        self,
        names: Iterable[str],
        here: Callable[[str], Result],
        there: Callable[[Worker, str], Result],
    ) -> dict[str, Result]:
        """Do something for each client, as processes get free; return the results in the order of
        `names`. Raises what the first one to fail raised.

        here: does it in this process. there: does it in a worker.
        """
        order, waiting = list(names), queue.SimpleQueue[str]()
        for name in order:
            waiting.put(name)
        results: dict[str, Result] = {}
        problems: list[Exception] = []

        # Each process takes the next client; after the first problem nobody takes another.
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

        # Whatever ends this, Ctrl-C too, no process goes on with a client's files.
        try:
            threads = []
            for worker in self._ready(len(order)):
                threads.append(threading.Thread(target=work_beside, args=(worker,), daemon=True))
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
        """Start as many processes as there is work for beside this one, and return them."""
        wanted = min(len(self._devices), tasks)
        for number in range(len(self._beside) + 1, wanted):
            device = self._devices[number]
            self._beside.append(Worker(number, device, self._folder, self._store, self.report))
        return self._beside[: max(0, wanted - 1)]


class Worker:
    """A worker is one process, as the main one sees it. number: from 1; the main process is 0."""

    def __init__(
        self, number: int, device: str, folder: RunFolder, store: UploadStore, report: Report
    ) -> None:
        self._number, self._folder, self._store, self._report = number, folder, store, report
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = Child(
                "comigs.engines.workers:main",
                [str(folder.path), str(number), device, str(theirs.fileno()), *folder.words()],
                grace=0,  # it leaves the run alone as soon as this process is gone
                pass_fds=[theirs.fileno()],
                stdout=2,  # what libraries print is no answer
            )
        self._lines = self._socket.makefile("rw", encoding="utf-8")

    def exchange(self, name: str, task: Task, download: str | None) -> Reply:
        """Do `ClientHost.exchange` there; download: a parcel. Raises what was raised there."""
        asked = {"do": "exchange", "name": name, "task": asdict(task), "download": download}
        said = self._ask(asked)
        self._folder.take(said["staged"])
        upload = None if said["upload"] is None else self._store.read(Path(said["upload"]))
        return Reply(upload, said["metrics"], said["timing"], said["train_tokens"], said["round"])

    def probe(self, name: str, uploads: Mapping[str, str], round: int) -> dict[str, float]:
        """Do `ClientHost.probe` there; uploads: parcels. Raises what was raised there."""
        staged = self._folder.staged(f"clients/{name}/")
        asked = {"do": "probe", "name": name, "uploads": dict(uploads), "round": round}
        nats: dict[str, float] = self._ask({**asked, "staged": staged})["nats"]
        return nats

    def close(self) -> None:
        """End the process. What it was doing is lost."""
        self._process.kill()
        self._process.wait()
        self._socket.close()

    def _ask(self, question: Line) -> Line:
        # Steps are reported as they come; the answer, or what was raised there, is the last line.
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

        # The system gives no reason for killing a process; memory is the one it mostly has.
        code = self._process.wait()
        why = " (killed; perhaps memory was short)" if code == KILLED else ""
        resume = command("resume", self._folder.path)
        raise UserError(
            f"worker {self._number}: ended with code {code}{why}; every whole round is kept. "
            f"Go on with: {resume} --workers 1"
        )


def _problem(said: Line) -> Exception:
    return {kind.__name__: kind for kind in KNOWN}.get(said["type"], RuntimeError)(said["text"])


def _say(lines: Any, line: Mapping[str, Any]) -> None:
    lines.write(json.dumps(line) + "\n")
    lines.flush()


class _Inside:
    """A worker's own end answers one question after the other."""

    def __init__(self, folder: RunFolder, number: str, device: str, report: Report) -> None:
        # The base is as the main process has it, but for the device, or nothing is trained.
        config = folder.config()
        section = config.base.model_copy(update={"device": device})
        if section.threads is not None:
            torch.set_num_threads(section.threads)
        base = load_base(section)
        require_same_base(folder, base)
        place, texts = workplace(config, load_method(config), base), prepare(config, base.encoder)
        self._folder, self._store = folder, UploadStore(folder.scratch / "uploads" / number)
        self._host = ClientHost(place, texts, folder, self._store, report)

    def answer(self, question: Line) -> Line:
        """Answer what the main process asks: `do` says which function below, all else is for it."""
        self._folder.follow()
        return getattr(self, f"_{question.pop('do')}")(**question)  # type: ignore[no-any-return]

    def _exchange(self, name: str, task: Line, download: str | None) -> Line:
        # JSON has no tuples.
        splits = {key: tuple(task[key]) for key in ("evaluate", "evaluate_base")}
        prior = task["prior"] and tuple(tuple(weights_E) for weights_E in task["prior"])
        received = {} if download is None else self._store.read(Path(download))
        reply = self._host.exchange(name, Task(**{**task, **splits, "prior": prior}), received)
        upload = str(reply.upload.path) if isinstance(reply.upload, StoredUpload) else None
        return {
            "upload": upload,
            "metrics": [line.as_json() for line in reply.metrics],
            "timing": reply.timing.as_json(),
            "train_tokens": reply.train_tokens,
            "round": reply.round,
            "staged": self._folder.staged(f"clients/{name}/"),
        }

    def _probe(self, name: str, uploads: Line, round: int, staged: Line) -> Line:
        self._folder.take(staged)
        read = {author: self._store.read(Path(path)) for author, path in uploads.items()}
        return {"nats": self._host.probe(name, read, round)}


def main() -> None:
    """Serve `RUN NUMBER DEVICE FILE-DESCRIPTOR READER...` until the socket closes."""
    path, number, device, file, *words = sys.argv[1:]
    lines = socket.socket(fileno=int(file)).makefile("rw", encoding="utf-8")
    inside: _Inside | None = None
    for line in lines:
        # Whatever goes wrong, in loading the base, too, is an answer: the main process raises it.
        try:
            if inside is None:
                folder = RunFolder.open(Path(path), Reader.of(words))
                inside = _Inside(folder, number, device, lambda event: _say(lines, event.as_json()))
            _say(lines, {**inside.answer(json.loads(line)), "kind": "answer"})
        except Exception as problem:
            if not isinstance(problem, KNOWN):
                traceback.print_exc()
            _say(lines, {"kind": "problem", "type": type(problem).__name__, "text": str(problem)})
