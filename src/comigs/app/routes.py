"""Where the tokens of a text go in clients' own models: what has to be right before one is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from comigs.app import api
from comigs.bases.load import Base
from comigs.data.files import decode, reading
from comigs.data.prepare import prepare
from comigs.errors import UserError
from comigs.personal.model import require_model
from comigs.personal.routes.coloured import Scale, coloured
from comigs.personal.routes.describe import ReadText, describe
from comigs.personal.routes.languages import function_words
from comigs.personal.routes.weights import shared_experts
from comigs.personal.serve.catalogue import names_of
from comigs.runs.environment import require_no_federation, require_one_base
from comigs.runs.folder import RunFolder
from comigs.runs.reader import ANYBODY, Reader
from comigs.runs.routes import Routes
from comigs.text import count, one_line

PASSAGE = 300  # tokens that are shown as they stand


def routes(
    runs: Sequence[Path | str],
    clients: Sequence[str],
    file: Path | None = None,
    tokens: int = PASSAGE,
    reader: Reader = ANYBODY,
) -> list[Routes]:
    """Return where the tokens of a text go in these clients' own models, in each of these runs.

    The runs are on one base. file: a text in UTF-8; None: each client's own test text, which is the
    same in all runs. tokens: how many of the first ones are kept as they stand. The clients of the
    first run come first. Raises UserError.
    """
    # Whatever can be wrong is said before the base is loaded.
    function_words()
    written = None if file is None else read_text(file)
    names = names_of([Path(run) for run in runs])
    folders = [RunFolder.open(Path(run), reader) for run in runs]
    require_one_base(folders, "their tokens and blocks differ: look at them apart")
    for folder in folders:
        _require_readable(folder, clients)
    base = api.base_of(folders[0])

    found = []
    for client in clients:
        if file is not None and written is not None:
            text = _as_tokens(file, written, base)
        else:
            text = _test_text(folders, client, base)
        for name, folder in zip(names, folders, strict=True):
            described = describe(folder, base, client, text, tokens)
            found.append(described.model_copy(update={"run": name}))
    return found


def read_text(file: Path) -> str:
    """Return what a file holds. Raises UserError where that is nothing, or is not UTF-8."""
    with reading(file):
        text = decode(file.read_bytes(), str(file))
    if not text.strip():
        raise UserError(f"{file}: holds no text; give a file with at least a word in it")
    return text


def _require_readable(folder: RunFolder, clients: Sequence[str]) -> None:
    """Raise UserError where a client's model is not here, or routes nothing."""
    for client in clients:
        folder.config().client_named(client)
    require_no_federation(folder, "each shows its own routes, from its own run folder")
    for client in clients:
        shared_experts(folder, client)
        require_model(folder, client)


def _as_tokens(file: Path, text: str, base: Base) -> ReadText:
    """Return a file's text as a single document."""
    (ids,) = base.encoder.encode([text])
    separator = base.encoder.separator
    return ReadText(file.name, [np.array([separator, *ids, separator])])


def _test_text(folders: Sequence[RunFolder], client: str, base: Base) -> ReadText:
    """Return the test text of a client, which must be the same in all runs. Raises UserError."""
    first = folders[0]
    hashes = [folder.environment()["data"][client]["test"]["sha256"] for folder in folders]
    for folder, own in zip(folders, hashes, strict=True):
        if own != hashes[0]:
            raise UserError(
                f"{folder.path}: has another test text of {client} than {first.path}; look at them "
                "apart, or give one text with --text FILE"
            )
    data = prepare(first.config(), base.encoder)
    api.require_same_text(first, data)
    length, streams = first.config().data.sequence_length, list[Any]()
    for store in data.load(client).test:
        streams += store.streams(length)
    return ReadText("test", streams)


def passage_lines(routes: Routes, block: int | None, relative: bool) -> list[str]:
    """Return a passage for a terminal: which model it is of, the coloured text, what colours say.

    block: the one whose weights are shown; None: their mean. relative: colours say how far a token
    is from the mean of all tokens there, of which two deviations are the whole colour.
    """
    where = f"mean of {routes.blocks} blocks"
    shown = [token.mean for token in routes.passage]
    if block is not None:
        where = f"block {block} of 0 to {routes.blocks - 1}"
        shown = [token.weights[block] for token in routes.passage]
    scale = Scale()
    if relative:
        scale = Scale(float(np.mean(shown)), 2 * float(np.std(shown)))
    texts = [token.text for token in routes.passage]
    kept = f"the first {count(len(shown))} of {count(routes.every.tokens)} tokens"
    return [
        one_line(f"{routes.who}: {kept} of {routes.text}"),
        coloured(zip(texts, shown, strict=True), scale),
        f"(weight of {routes.sides[0]}, {where}: mean {np.mean(shown):.2f}; {scale.legend})",
    ]
