"""An audit of what a run's uploads and models give away: canaries are planted, and guessed at.

The run is an ordinary one, in process, whose clients' train text has made-up documents in it by
coin flips. What a server sees of each client in the last round, what everybody gets in the end, and
each client's own model are then asked which of them were in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from comigs.app.dry_run import fitted
from comigs.app.setup import ignore, load, read_texts, say_unread
from comigs.bases.load import Base
from comigs.client.evaluate import measure
from comigs.client.workplace import attach
from comigs.config import Config
from comigs.data.batches import Batch
from comigs.data.canaries import Canary, PlantedTexts, make_up
from comigs.data.prepare import require_text
from comigs.engines.in_process import InProcess
from comigs.errors import Stopped, UserError
from comigs.experiments.audit.figures import Promise, Row, Score, rows
from comigs.experiments.audit.page import AUDIT, write_page
from comigs.experts.attach import Attachment
from comigs.files import require_free, write_whole, writing
from comigs.methods.loading import load_method
from comigs.methods.method import Download, Method, Tensors, Upload
from comigs.personal.model import PersonalModel
from comigs.processes import interrupts
from comigs.runs.environment import environment
from comigs.runs.folder import RunFolder
from comigs.runs.metrics import RoundEnd, TrainReport
from comigs.runs.new import claimed, default_folder, new_folder
from comigs.runs.summary import write_summary
from comigs.server.protocol import Answers, Report, Task
from comigs.server.rounds import run_rounds
from comigs.server.validation import common_start
from comigs.slots import OTHERS, Shapes, Slot
from comigs.text import Say

FEWEST, MOST = 8, 4096  # canaries of a client for each number of copies
UPLOAD, SHARED, PERSONAL = "a client's last upload", "what everybody gets", "the personal model"


@dataclass
class Watched:
    """A watched engine is InProcess, whose last uploads and last downloads are kept."""

    engine: InProcess
    last: int
    sent: dict[str, Tensors] = field(default_factory=dict)
    uploads: dict[str, Upload] = field(default_factory=dict)
    shared: dict[str, Download] = field(default_factory=dict)

    @property
    def shapes(self) -> Mapping[str, Shapes]:
        """The shape of every tensor that a client has, by client."""
        return self.engine.shapes

    def exchange(self, tasks: Mapping[str, Task], downloads: Mapping[str, Download]) -> Answers:
        """Do the exchange, and keep what is looked at later."""
        answers = self.engine.exchange(tasks, downloads)
        (round,) = {task.round for task in tasks.values()}
        if round == self.last:
            self.sent = {name: dict(download) for name, download in downloads.items()}
            for name, reply in answers.replies.items():
                self.uploads[name] = dict(reply.upload or {})
        if round > self.last:
            self.shared = {name: dict(download) for name, download in downloads.items()}
        return answers

    def probe(self, uploads: Mapping[str, Upload], round: int) -> dict[str, dict[str, float]]:
        """Do as InProcess does."""
        return self.engine.probe(uploads, round)


def audit(
    config: Config,
    canaries: int,
    out: Path | None = None,
    report: Report = ignore,
    say: Say = ignore,
) -> tuple[RunFolder, list[Row]]:
    """Run a config with planted canaries, and return its folder and what guesses came to.

    canaries: of each client for each number of copies. Writes audit.json and audit.html into the
    folder. Raises UserError for bad input, and Stopped, after which the audit begins anew.
    """
    config = config.model_copy(update={"name": f"{config.name}-audit"})
    with claimed(out):
        require_free(out or default_folder(config))
        method = load_method(config)
        require_text(config)
        _require_possible(config, method, canaries)
        say_unread(config, "in-process", say)
        base, config = load(config, say)
        config = fitted(config, base, say)
        texts = read_texts(config, base, report, say)
        if texts.has_chats:
            raise UserError("audit: a client's text is chats, and canaries are plain documents")
        made = {name: make_up(config.seed, name, canaries) for name in texts.names}
        data = PlantedTexts(texts, made, base.encoder, config.seed)
        folder = new_folder(out, config, environment(base, data.load_all()))

    # The run is as any other, but that it cannot be gone on with: its uploads would be missing.
    try:
        with folder, interrupts():
            say(f"run folder {folder.path}")
            watched = Watched(InProcess(config, method, base, data, folder, report), config.rounds)
            try:
                run_rounds(config, method, watched, folder, report)
            finally:
                watched.engine.close()
            write_summary(folder, config, method)
            say("guessing who was in")
            found = _rows(config, method, base, folder, watched, made)
    except KeyboardInterrupt:
        raise Stopped("an audit cannot be gone on with; start it again") from None
    except torch.OutOfMemoryError:
        raise UserError(
            "the memory of the device is full; start the audit again with a lower "
            "client.micro_batch_size and evaluation.batch_size"
        ) from None
    _write(folder, config, canaries, found)
    return folder, found


def _require_possible(config: Config, method: Method, canaries: int) -> None:
    """Refuse what cannot be audited. Raises UserError."""
    if not FEWEST <= canaries <= MOST:
        raise UserError(f"--canaries: given {canaries}; must be {FEWEST} to {MOST}")
    # Each client must train by itself, and what it sends in one round must be a model.
    if method.centralized:
        raise UserError(
            f'method: "{config.method}" trains on all text in one place, and no client has an '
            "upload of its own; choose another method"
        )
    if method.merges:
        raise UserError(
            f'method: "{config.method}" merges updates into the base, and what is sent says little '
            "without all that was sent before; choose another method"
        )
    # Canaries are in this process's memory, and every client's last upload is looked at.
    if config.workers > 1:
        raise UserError(f"workers: given {config.workers}; an audit needs 1")
    if config.conditions.given:
        raise UserError("conditions: given, but an audit simulates no devices; leave it out")
    if config.participation.clients_per_round is not None:
        raise UserError(
            f"participation.clients_per_round: given {config.participation.clients_per_round}, but "
            "an audit looks at every client's last upload; leave it out"
        )


def _rows(
    config: Config,
    method: Method,
    base: Base,
    folder: RunFolder,
    watched: Watched,
    canaries: Mapping[str, Sequence[Canary]],
) -> list[Row]:
    """Return what can be told from uploads, from what everybody gets, and from personal models."""
    scores: dict[str, list[Score]] = {UPLOAD: [], SHARED: [], PERSONAL: []}
    reference: dict[str, list[float]] = {}
    with attach(config, method, base) as attachment:
        for name, of_client in canaries.items():
            reference[name] = _nats(attachment, base, {}, of_client)
            for what, tensors in _seen(config, method, watched, name).items():
                nats = _nats(attachment, base, tensors, of_client)
                scores[what] += _scores(name, of_client, nats, reference[name])

    # A client's own model is what whoever opens the run gets.
    for name, of_client in canaries.items():
        with closing(PersonalModel(folder, name, base)) as model:
            nats = _nats(model.attachment, base, model.tensors, of_client)
        scores[PERSONAL] += _scores(name, of_client, nats, reference[name])
    found, spent = list[Row](), epsilon_of(folder)
    for what, of_what in scores.items():
        promised = partial(_promised, config, spent, what)
        found += rows(what, of_what, config.privacy.delta, promised)
    return found


def _promised(config: Config, spent: float | None, seen: str, copies: int) -> Promise | None:
    """Return what a run that has spent so much promises of this; None for nothing."""
    if spent is None:
        return None
    promise = Promise(spent, config.privacy.delta)
    if config.privacy.by_client:
        return promise if seen == SHARED else None
    return promise.of_copies(copies) if seen in (UPLOAD, SHARED) else None


def epsilon_of(folder: RunFolder) -> float | None:
    """Return what a run has spent at most on anybody's text; None where nothing is private."""
    lines = [line for line in folder.metrics() if isinstance(line, TrainReport | RoundEnd)]
    return max((line.epsilon for line in lines if line.epsilon is not None), default=None)


def _seen(config: Config, method: Method, watched: Watched, name: str) -> dict[str, Tensors]:
    """Return the models that others can make of what they have of a client."""
    # What an upload does not have, whoever has it knows: the common start, and what was sent.
    start, known = common_start(config.seed), dict[Slot, Tensor]()
    for slot, dims in watched.shapes[name].items():
        if method.shares(slot) and not slot.is_frozen:
            known[slot] = start(slot, dims)
    seen: dict[str, Tensors] = {}
    if watched.uploads.get(name):
        seen[UPLOAD] = {**known, **watched.sent.get(name, {}), **watched.uploads[name]}
    # Where a client gets the others' expert without its own, its own is in what the next one gets.
    download, names = watched.shared.get(name, {}), list(watched.shared)
    if any(slot.role == OTHERS for slot in download):
        download = watched.shared[names[names.index(name) - 1]]
    if download:
        seen[SHARED] = {**known, **download}
    return seen


def _nats(
    attachment: Attachment,
    base: Base,
    tensors: Tensors,
    canaries: Sequence[Canary],
) -> list[float]:
    """Return the nats of each canary, from separator to separator, of a model of these tensors."""
    on_device = {slot: tensor.to(base.device) for slot, tensor in tensors.items()}
    attachment.bind(on_device)
    end, found = base.encoder.separator, []
    for ids in base.encoder.encode([canary.text for canary in canaries]):
        inputs, targets = np.array([[end, *ids]]), np.array([[*ids, end]])
        found.append(measure(attachment, [Batch(inputs, targets)], base.dtype).nats)
    return found


def _scores(
    name: str, canaries: Sequence[Canary], nats: Sequence[float], reference: Sequence[float]
) -> list[Score]:
    scores = []
    for canary, own, of_base in zip(canaries, nats, reference, strict=True):
        scores.append(Score(name, canary.copies, canary.member, own - of_base))
    return scores


def _write(folder: RunFolder, config: Config, canaries: int, found: Sequence[Row]) -> None:
    """Write audit.json and audit.html into the run folder. Raises UserError."""
    told: dict[str, Any] = {
        "canaries": canaries,
        "seed": config.seed,
        "delta": config.privacy.delta,
        "run": config.privacy.promise,
        "rows": [row.as_json() for row in found],
    }
    text = json.dumps(told, indent=1) + "\n"
    with writing(folder.path, "make room or allow writing"):
        write_whole(folder.path / f"{AUDIT}.json", lambda path: path.write_text(text, "utf-8"))
    write_page(folder.path / f"{AUDIT}.html", config, canaries, found)
