"""This source is a dataset of the `datasets` library: each row is a text or a chat (data/shapes).

The dataset is from the library's hub, or from a folder on this machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from comigs.data.document import Document
from comigs.data.files import resolve
from comigs.data.shapes import Reader
from comigs.errors import UserError

SUMMARY = (
    "hub:NAME[:CONFIG]:SPLIT: rows of a `datasets` dataset, each a text (`text`) or a chat "
    "(`messages`, ...), by hub name or local folder; hub:FOLDER of one without splits"
)
# A dataset that is a script is a RuntimeError, and whatever else is wrong with one a ValueError.
FAILURES = (OSError, ValueError, RuntimeError)
VERSION = "as published"
LICENSE = "as the dataset's card says"


def load(argument: str, root: Path) -> Iterator[Document]:
    """Yield the rows in order, streamed: a hub dataset is read as it comes and not stored.

    NAME may be a folder written by `save_to_disk`, or one of data files; relative to `root`. A
    folder that holds one dataset without splits is given without one.
    """
    reader, rows = Reader(), _open(argument, root)
    for number, row in enumerate(_guarded(rows, argument)):
        yield reader.document(row, f"hub:{argument}: row {number}", f"{argument}:{number}")


def _open(argument: str, root: Path) -> Iterable[dict[str, Any]]:
    """Return the dataset's rows, not read yet."""
    name, *more = parts = argument.split(":")
    folder = resolve(name, root)
    is_one = bool(name) and (folder / "state.json").exists()
    if is_one and more:
        raise UserError(
            f"hub:{argument}: {folder} is one dataset without splits; give hub:{name}, which is "
            "split here (docs/data.md)"
        )
    if not is_one and (len(parts) not in (2, 3) or not all(parts)):
        raise UserError(f"hub:{argument}: expected hub:NAME:SPLIT or hub:NAME:CONFIG:SPLIT")
    # The library is an extra, and takes seconds to import.
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"hub:{argument}: needs the `datasets` library; pip install 'comigs[hub]'"
        ) from None
    failures = (*FAILURES, datasets.exceptions.DatasetsError)
    try:
        if is_one:
            alone: Iterable[dict[str, Any]] = datasets.load_from_disk(str(folder))
            return alone
        *config, split = more
        if not (folder / "dataset_dict.json").exists():
            path = str(folder) if folder.is_dir() else name
            rows: Iterable[dict[str, Any]] = datasets.load_dataset(
                path, *config, split=split, streaming=True
            )
            return rows
        saved = datasets.load_from_disk(str(folder))
    except failures as error:
        raise _user_error(argument, error) from None
    if split not in saved:
        raise UserError(f'hub:{argument}: no split "{split}"; there are: {", ".join(saved)}')
    rows = saved[split]
    return rows


def _guarded(rows: Iterable[dict[str, Any]], argument: str) -> Iterator[dict[str, Any]]:
    """Yield the rows. A download that fails on the way is one line, too."""
    iterator = iter(rows)
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except FAILURES as error:
            raise _user_error(argument, error) from None
        yield row


def _user_error(argument: str, error: Exception) -> UserError:
    """Return the first line of the library's message, unless it is ours already."""
    if isinstance(error, UserError):
        return error
    message = str(error).strip().splitlines() or [type(error).__name__]
    return UserError(f"hub:{argument}: cannot be read: {message[0]}")
