"""This source is the Debian manual pages installed on this machine, as plain text.

Each page is a document. A page's name decides its split, so a page is in the same split in all
languages.
"""

from __future__ import annotations

import gzip
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from comigs.data.document import Document
from comigs.data.files import reading
from comigs.errors import UserError

SUMMARY = "manpages:LANGUAGE: the manual pages installed in a language (en, fr, de, ...)"
VERSION = "as installed"
LICENSE = "each page's own free licence"

MAN_ROOT = Path("/usr/share/man")
# One line per paragraph, so nothing is hyphenated or stretched; grotty without overstrikes, colours
# or underlines.
GROFF = ("groff", "-Tutf8", "-mandoc", "-t", "-Kutf8", "-P-cbou", "-rLL=30000n", "-rHY=0")
# Sections about people and licences, by how their titles start in the languages Debian translates
# to.
DROPPED = re.compile(
    r"(AUTHOR|AUTEUR|AUTOR|COPY|COPI|KOPI|LICEN|LIZENZ|COLOPHON|KOLOPHON|REPORTING BUGS"
    r"|TRADU|TRANSLAT|ÜBERSETZ|VERTAL|DROITS|DIRITTI|DERECHOS)",
    re.IGNORECASE,
)
LARGEST = 1 << 26  # bytes of a page
PAGES_AT_ONCE = 64  # rendered ahead of the reader


def load(argument: str, root: Path) -> Iterator[Document]:
    """Yield the pages of one language in the order of their paths.

    Links and `.so` pages, which only repeat, are left out; `left_out` counts them.
    """
    folder = _folder(argument)
    pages = []
    # A language such as ".." would name another folder.
    if re.fullmatch(r"[A-Za-z][A-Za-z_@.]*", argument):
        pages = sorted(p for p in folder.glob("man*/*") if p.is_file() and not p.is_symlink())
    if not pages:
        language = argument.lower().replace("_", "-")
        package = "manpages" if argument == "en" else f"manpages-{language}"
        raise UserError(
            f"manpages:{argument}: no manual pages in {folder}; try `apt-get install {package}`"
        )
    if shutil.which("groff") is None:
        raise UserError(
            f"manpages:{argument}: groff, which renders them, is missing; "
            "`apt-get install groff-base`"
        )
    # Each page is a process of its own, so that threads are enough to use all cores.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(pages), PAGES_AT_ONCE):
            some = pages[start : start + PAGES_AT_ONCE]
            for page, text in zip(some, pool.map(_render, some), strict=True):
                if text:
                    name = page.name.removesuffix(".gz")
                    yield Document(text, name, key=name)


def left_out(argument: str, root: Path) -> dict[str, int]:
    """Count the pages that only point to another."""
    number = 0
    for page in _folder(argument).glob("man*/*"):
        if page.is_file():
            number += page.is_symlink() or _points(_source(page))
    return {"pages that only point to another": number} if number else {}


def _folder(language: str) -> Path:
    return MAN_ROOT if language == "en" else MAN_ROOT / language


def _render(page: Path) -> str:
    """Return one page as plain text; '' for a page that only points to another."""
    source = _source(page)
    if _points(source):
        return ""
    # groff's safe mode (its default) keeps a page from running commands or writing files.
    done = subprocess.run(
        GROFF, input=source, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False
    )
    return _clean(done.stdout.decode(errors="replace"))


def _source(page: Path) -> bytes:
    """Return one page as it is written. Raises UserError where it grows without end."""
    with reading(page), gzip.open(page) if page.suffix == ".gz" else page.open("rb") as file:
        source = file.read(LARGEST + 1)
    if len(source) > LARGEST:
        raise UserError(f"{page}: larger than {LARGEST:,} bytes; no manual page is")
    return source


def _points(source: bytes) -> bool:
    return source.lstrip().startswith(b".so ")


def _clean(rendered: str) -> str:
    """Return a page without header, footer, indentation, and sections on people and licences."""
    lines = rendered.strip().splitlines()[1:-1]
    kept: list[str] = []
    dropping = False
    for line in lines:
        if line[:1].strip():  # only titles of sections start at the margin
            dropping = DROPPED.match(line) is not None
        if not dropping:
            kept.append(re.sub(r"\s+", " ", line).strip())
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()
    return f"{text}\n" if text else ""
