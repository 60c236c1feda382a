"""This module holds what a person does with CoMiGS, as functions; the command line only prints.

import comigs

config = comigs.load_config("configs/quickstart.toml", ["rounds=5"])
folder = comigs.run(config)
print(folder.summary().mean.test)
model = comigs.open_personal_model(folder.path, "fr")
print(model.generate("Le système"))
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from comigs.app.dry_run import fitted
from comigs.app.forecast import require_covered
from comigs.app.setup import everybody_trains, ignore, load, read_texts, say_unread
from comigs.bases.load import Base, is_here
from comigs.config import SPLITS, Config, Split
from comigs.data.prepare import Texts, require_text
from comigs.data.prepare import prepare as prepare_data
from comigs.engines.conditions.engine import engine_for
from comigs.engines.in_process import InProcess
from comigs.errors import Stopped, UserError, nearest
from comigs.files import command, require_free
from comigs.methods.loading import load_method
from comigs.personal.model import PersonalModel, clients_here, require_model
from comigs.processes import interrupts
from comigs.runs.environment import (
    describe,
    environment,
    require_no_federation,
    require_same_base,
    require_same_chats,
)
from comigs.runs.folder import RunFolder
from comigs.runs.metrics import Note
from comigs.runs.new import claimed, default_folder, new_folder
from comigs.runs.reader import ANYBODY, Reader
from comigs.runs.summary import write_summary
from comigs.runs.track.tracks import Tracks
from comigs.server.protocol import Report
from comigs.server.rounds import run_rounds
from comigs.text import Say, plural


def run(
    config: Config, out: Path | str | None = None, report: Report = ignore, say: Say = ignore
) -> RunFolder:
    """Run a config whole: prepare the text, train all clients, measure each one's own model.

    out: the new run folder; None: the next free `runs/NAME`. report: gets each line of metrics as
    it comes, and steps and notes in between. say: gets lines of progress before the first round.
    Returns the run folder. Raises UserError for bad input.
    """
    out = Path(out) if out is not None else None
    with claimed(out):
        # what cannot be is refused before anything is loaded
        require_free(out or default_folder(config))
        load_method(config)
        require_text(config)
        say_unread(config, "in-process", say)

        # text or memory that does not suffice leaves no folder behind
        base, config = load(config, say)
        data = read_texts(config, base, report, say)
        known = data.load_all() if everybody_trains(config) else data.outlines()
        config = fitted(config, base, say)
        require_covered(config, base, data)
        folder = new_folder(out, config, environment(base, known))

    with folder, _going_on(folder):
        say(f"run folder {folder.path}")
        report(Note(message="measuring the base"))
        _go_on(folder, config, base, data, report)
    return folder


def resume(
    path: Path | str,
    report: Report = ignore,
    say: Say = ignore,
    workers: int | None = None,
    reader: Reader = ANYBODY,
) -> RunFolder:
    """Go on with a stopped run from its last whole round; a finished run is summed up again.

    workers: in place of the config's, for another machine. reader: what the run's folder cannot
    say. Returns the run folder. Raises UserError.
    """
    with RunFolder.open(Path(path), reader) as folder, _going_on(folder):
        config, last = folder.config(), folder.rewind()
        if workers is not None:
            config = config.model_copy(update={"workers": workers})
        if last.finished:
            rounds = plural(last.round, "round")
            say(f"{path}: finished already, after {rounds}; nothing to go on with")
            write_summary(folder, config, load_method(config))
            with Tracks(config, folder, report):
                pass  # they are told what they lack
            return folder

        # another base or text would make it another run from here on
        base, _ = load(config, say)
        require_same_base(folder, base)
        data = read_texts(config, base, report, say)
        require_same_text(folder, data)

        # where few are asked, what a client goes on from is checked when it is asked
        if everybody_trains(config):
            for part in last.newest:
                folder.load(part)
        say(f"going on after round {last.round} of {config.rounds}")
        report(Note(message="measuring" if last.round else "measuring the base"))
        _go_on(folder, config, base, data, report)
    return folder


def prepare(config: Config, say: Say = ignore) -> Texts:
    """Read, split, check and tokenise the clients' text.

    What was tokenised before is compared with its sha256. Raises UserError.
    """
    load_method(config)
    base, config = load(config)
    data = prepare_data(config, base.encoder, say)
    for line in data.notes():
        say(line)
    for client in data.load_all().values():  # loading a client's text tokenises it
        for split in SPLITS:
            for store in getattr(client, split):
                store.verify()
    return data


def open_run(path: Path | str | RunFolder, reader: Reader = ANYBODY) -> RunFolder:
    """Open a run on disk, as its reader wants it opened; what is open stays as it is.

    Raises UserError where there is none.
    """
    if isinstance(path, RunFolder):
        return path
    return RunFolder.open(Path(path), reader)


def open_personal_model(
    path: Path | str,
    client: str,
    reader: Reader = ANYBODY,
) -> PersonalModel:
    """Open a client's own model from a run, finished or not. Raises UserError."""
    folder = open_run(path, reader)
    folder.config().client_named(client)
    folder.require_a_round()
    return PersonalModel(folder, client, base_of(folder))


def base_of(folder: RunFolder) -> Base:
    """Return the base of a run, for reading its models here. Raises UserError."""
    return load(_with_a_device(folder.config()))[0]


def evaluate(
    path: Path | str,
    split: Split = "test",
    client: str | None = None,
    reader: Reader = ANYBODY,
    say: Say = ignore,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Measure clients' own models and the base again.

    client: only this one; None: all that have one. reader: what the run's folder cannot say.
    Returns client -> "base" and "personal" -> figures. Raises UserError.
    """
    split_named(split)
    folder = open_run(path, reader)
    base, data, names = measurable(folder, client, say)
    results = {}
    for name in names:
        with closing(PersonalModel(folder, name, base)) as model:
            stores = getattr(data.load(name), split)
            results[name] = {
                "base": model.evaluate(stores, untouched_base=True).figures(),
                "personal": model.evaluate(stores).figures(),
            }
    return results


def measurable(
    folder: RunFolder, client: str | None, say: Say = ignore
) -> tuple[Base, Texts, list[str]]:
    """Return the base, the texts and the names of the clients whose models can be measured here.

    client: only this one; None: all. What is wrong with a name or the text is said before any model
    is measured. Raises UserError.
    """
    base, names = measurable_models(folder, client, say)
    data = prepare_data(folder.config(), base.encoder)
    require_same_text(folder, data)
    return base, data, names


def measurable_models(
    folder: RunFolder, client: str | None, say: Say = ignore
) -> tuple[Base, list[str]]:
    """Return the base and the names of the clients, where no text is needed.

    client: only this one; None: all that have a model here. say: gets a line where others have
    none. Raises UserError where there is no such client, no round, or no model here.
    """
    require_no_federation(folder, f"what they measured: {command('report', folder.path)}")
    names = folder.config().names
    folder.require_a_round()
    here = clients_here(folder)
    if client is not None or not here:
        require_model(folder, client or names[0])
        here = [client or names[0]]
    elif without := [name for name in names if name not in here]:
        say(f"no model here of {', '.join(without)}")
    return base_of(folder), here


def split_named(name: str) -> Split:
    """Return the split of that name. Raises UserError where there is none."""
    for split in SPLITS:
        if split == name:
            return split
    raise UserError(
        f'split: given "{name}"; must be train, valid or test.{nearest(name, list(SPLITS))}'
    )


def _with_a_device(config: Config) -> Config:
    """Return the config with a device that is here: models are read where they were not made."""
    name = config.base.device
    if name == "auto" or is_here(torch.device(name)):
        return config
    return config.model_copy(update={"base": config.base.model_copy(update={"device": "auto"})})


def _go_on(folder: RunFolder, config: Config, base: Base, data: Texts, report: Report) -> None:
    """Run the rounds that are left, and sum the run up."""
    method = load_method(config)
    clients = InProcess(config, method, base, data, folder, report)
    engine = engine_for(config, method, clients, folder, report)
    try:
        run_rounds(config, method, engine, folder, report)
    finally:
        engine.close()
    write_summary(folder, config, method)


@contextmanager
def _going_on(folder: RunFolder) -> Iterator[None]:
    """Say how to go on with a run that is stopped by hand or for want of memory."""
    try:
        with interrupts():
            yield
    except KeyboardInterrupt:
        again = command("resume", folder.path)
        raise Stopped(f"every whole round is kept; go on with: {again}") from None
    except torch.OutOfMemoryError:
        raise UserError(
            f"{folder.path}: the memory of the device is full; every whole round is kept. Free "
            "some and resume, or start a new run with a lower client.micro_batch_size and "
            "evaluation.batch_size"
        ) from None


def require_same_text(folder: RunFolder, data: Texts) -> None:
    """Raise UserError where a client's text, or how chats are read, is not what it was."""
    if data.has_chats:
        require_same_chats(folder, data.encoder)
    then = _hashes(folder.environment()["data"])
    now = _hashes(describe(data.outlines()))
    changed = [name for name in now if now[name] != then.get(name)]
    if changed:
        raise UserError(
            f"{folder.path}: the text of {', '.join(changed)} has changed since this run began; "
            "put it back or start a new run"
        )


def _hashes(described: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return client -> split -> hashes of its text."""
    hashes: dict[str, dict[str, Any]] = {}
    for name, splits in described.items():
        hashes[name] = {split: facts["sha256"] for split, facts in splits.items()}
    return hashes
