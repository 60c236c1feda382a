"""This source is a folder of .txt and .md files, or one such file: each file is a document."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from stat import S_ISDIR

from comigs.data.document import Document
from comigs.data.files import decode, reading, resolve
from comigs.errors import UserError

SUMMARY = "folder:PATH: every .txt and .md file under a folder, each a document (or one such file)"
VERSION = "-"
LICENSE = "as your files"

SUFFIXES = (".txt", ".md")
ROWS = (".jsonl", ".jsonl.gz", ".parquet", ".arrow")  # files of texts, beside which cards lie
TABLES = (".csv", ".tsv", ".json")  # that may be texts, or say something of texts
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".tar", ".tgz", ".rar")
CARD = re.compile(
    r"(README|LICEN[CS]E|COPYING|CITATION|NOTICE|AUTHORS|CHANGELOG|CONTRIBUTING|CODE_OF_CONDUCT"
    r"|DATA_?(SET)?[_-]?CARD)",
    re.IGNORECASE,
)
DATASET = 'the folder may be a dataset: text = "hub:FOLDER{split}"'
CURES = {  # how a file ends that is no text -> what to do
    ROWS[2:] + TABLES: DATASET,
    COMPRESSED: "unpack it",
    (".pdf", ".docx", ".doc", ".odt", ".rtf", ".epub", ".html", ".htm"): "save it as plain text",
}


def load(argument: str, root: Path) -> Iterator[Document]:
    """Yield the files in the order of their paths.

    Hidden files and folders are left out, and links to folders not followed; `left_out` counts
    them. Raises UserError where the texts are rows of a data file, and what lies beside it is not.
    """
    path = resolve(argument, root)
    _require_no_rows(path)
    found = False
    for file, name in _files(path):
        found = True
        with reading(file):
            raw = file.read_bytes()
        yield Document(decode(raw, str(file)), name, key=name)
    if not found:
        kinds = {kind.removesuffix(" files") for kind in left_out(argument, root)}
        hint = f"; {DATASET.format(split=_split(path))}" if kinds & {*ROWS, *TABLES} else ""
        raise UserError(f"{path}: no .txt or .md file in this folder{hint}")


def _files(path: Path) -> Iterator[tuple[Path, str]]:
    """Yield each file with its path inside the folder."""
    with reading(path):
        is_folder = S_ISDIR(path.stat().st_mode)
    if not is_folder:
        if not path.name.lower().endswith(SUFFIXES):
            cures = [cure for ends, cure in CURES.items() if path.name.lower().endswith(ends)]
            hint = "".join(f"; {cure.format(split=_split(path.parent))}" for cure in cures[:1])
            raise UserError(
                f"{path}: not a folder, nor a .txt, .md, .jsonl, .jsonl.gz, .csv or .parquet "
                f"file{hint}"
            )
        yield path, path.name
        return
    with reading(path):
        for folder, inner, files in os.walk(path, onerror=_raise):
            # os.walk goes on with what is left in `inner`, in that order.
            inner[:] = sorted(name for name in inner if not name.startswith("."))
            for name in sorted(files):
                if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                    file = Path(folder, name)
                    yield file, file.relative_to(path).as_posix()


def left_out(argument: str, root: Path) -> dict[str, int]:
    """Count what is in a folder and no document."""
    path = resolve(argument, root)
    counts: Counter[str] = Counter()
    if path.is_file():
        return {}
    # What is hidden or behind a link is counted as a whole, as nobody looks into it.
    with reading(path):
        for folder, inner, files in os.walk(path, onerror=_raise):
            hidden = [name for name in inner if name.startswith(".")]
            inner[:] = sorted(set(inner) - set(hidden))
            linked = [name for name in inner if Path(folder, name).is_symlink()]
            counts["hidden folders"] += len(hidden)
            counts["links to folders"] += len(linked)
            counts.update(_kind(name) for name in files)
    return {kind: number for kind, number in sorted(counts.items()) if kind and number}


def _kind(name: str) -> str:
    """Return what is said of a file that is no document; '' of one that is."""
    if name.startswith("."):
        return "hidden files"
    if name.lower().endswith(SUFFIXES):
        return ""
    if name.lower().endswith(COMPRESSED):
        return "compressed files"
    return f"{Path(name).suffix.lower()} files" if Path(name).suffix else "files without a suffix"


def _require_no_rows(path: Path) -> None:
    """Refuse a folder of data files and what is written about them. Raises UserError.

    Rows are texts themselves; a table beside texts that are no cards may be about these.
    """
    if path.is_file():
        return
    rows: list[Path] = []
    tables: list[Path] = []
    texts: list[Path] = []
    with reading(path):
        for folder, inner, files in os.walk(path, onerror=_raise):
            inner[:] = sorted(name for name in inner if not name.startswith("."))
            for name in sorted(files):
                file = Path(folder, name)
                kinds = ((ROWS, rows), (TABLES, tables), (SUFFIXES, texts))
                for ends, found in kinds:
                    if name.lower().endswith(ends) and not name.startswith("."):
                        found.append(file)
                        break
    # Cards say what a dataset is, and are no text of anybody's.
    if texts and all(CARD.match(file.stem) for file in texts):
        rows += tables
    if rows and texts:
        first, more = rows[0].relative_to(path), f" and {len(rows) - 1} more" * (len(rows) > 1)
        raise UserError(
            f"{path}: has {first}{more} beside .txt or .md files; name the one that is meant: "
            f'text = ".../{first.name}", or "hub:{path}{_split(path)}", '
            "or move the data files out of the folder"
        )


def _split(folder: Path) -> str:
    """Return what follows a folder's name where it is a dataset; one saved alone has no splits."""
    return "" if (folder / "state.json").is_file() else ":train"


def _raise(error: OSError) -> None:
    """Raise the error, as os.walk would leave out a folder that it may not read."""
    raise error
