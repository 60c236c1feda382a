"""The models that a server offers: every client of every run, read onto one base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from comigs.bases.load import Base, set_dtype
from comigs.errors import UserError
from comigs.personal.model import clients_here
from comigs.personal.serve.app import Served
from comigs.personal.serve.packed import read_client
from comigs.runs.folder import RunFolder
from comigs.text import Say


def in_dtype(base: Base, dtype: torch.dtype) -> Base:
    """Return the base in another precision. Its weights stay what the experts were trained on."""
    set_dtype(base.model, dtype)
    return replace(base, dtype=dtype)


def read_models(folders: Sequence[RunFolder], base: Base, say: Say) -> dict[str, Served]:
    """Read every client that has a model: id (run/client) -> model. Raises UserError where one
    cannot be read.

    base: as in the runs, and in the precision in which it will serve; the tensors of a run are
    dropped once packed.
    """
    models: dict[str, Served] = {}
    ids = ids_of(folders)
    for id, (folder, client) in ids.items():
        created = int((folder.path / "checkpoint.json").stat().st_mtime)
        models[id] = Served(read_client(folder, client, base, id, len(models)), created)
    for folder in folders:
        here = [client for owner, client in ids.values() if owner is folder]
        if without := [name for name in folder.config().names if name not in here]:
            say(f"{folder.path}: no model here of {', '.join(without)}")
    return models


def ids_of(folders: Sequence[RunFolder]) -> dict[str, tuple[RunFolder, str]]:
    """Return every model that there is: id (run/client) -> its run and client. Raises UserError
    where there is none.
    """
    found = {}
    for folder, name in zip(folders, names_of([folder.path for folder in folders]), strict=True):
        for client in clients_here(folder):
            found[f"{name}/{client}"] = (folder, client)
    if not found:
        raise UserError(
            f"{folders[0].path}: holds no client's model; they are on the clients' own devices"
        )
    return found


def names_of(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of paths that tell them apart, in whole folder names.

    Raises UserError for equal paths.
    """
    whole = [path.resolve().parts for path in paths]
    if len(set(whole)) < len(whole):
        raise UserError("RUN: a run is given twice")
    for length in range(1, max(map(len, whole)) + 1):
        names = ["/".join(parts[-length:]) for parts in whole]
        if len(set(names)) == len(names):
            break
    return [name.lstrip("/") for name in names]
