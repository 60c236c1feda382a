"""This source is the Debian FAQ in four languages, bundled as demo text.

Each numbered section is a document. The four texts have the same sections, and a section's number
decides its split: what is test in one language is test in all of them.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from comigs.data.document import Document
from comigs.errors import UserError

SUMMARY = "debian-faq:LANGUAGE: bundled demo text in de, fr, it or nl, about 0.2 MB each"
VERSION = "11.1"
LICENSE = "permission notice beside it"

LANGUAGES = ("de", "fr", "it", "nl")
# These are left in English in more than one of the languages, and so would be the same document at
# two clients.
UNTRANSLATED = ("12.2.2", "13.3.2")
# The table of contents has the same numbers, but indented.
SECTION = re.compile(r"^(?=\d+\.\d+(?:\.\d+)?\.\s)", re.MULTILINE)
CHAPTER = re.compile(r"^(?:Kapitel|Chapitre|Capitolo|Hoofdstuk)\s\d+\.\s", re.MULTILINE)


def load(argument: str, root: Path) -> Iterator[Document]:
    """Yield the sections of one language in order, without their numbers and indentation."""
    if argument not in LANGUAGES:
        raise UserError(
            f"debian-faq:{argument}: no such language; there are: {', '.join(LANGUAGES)}"
        )
    file = files("comigs.data.sources") / "assets" / "debian-faq" / f"{argument}.txt.gz"
    # No-break spaces are layout, also in the indentation.
    text = gzip.decompress(file.read_bytes()).decode().replace("\xa0", " ")
    for section in SECTION.split(text)[1:]:
        number, body = section.split(maxsplit=1)
        number = number.removesuffix(".")
        if number not in UNTRANSLATED:
            # A chapter's last section is followed by the next chapter's title.
            body = re.sub(r"^ {4}", "", CHAPTER.split(body)[0], flags=re.MULTILINE)
            yield Document(f"{body.strip()}\n", number, key=number)
