"""This source is the Debian FAQ in four languages as questions and answers.

Each section of `debian-faq` whose title asks something is a chat: the title is what is asked, and
the section's text below it, as it stands there, is the answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from comigs.data.document import Document, chat
from comigs.data.sources import debian_faq

SUMMARY = "debian-faq-chat:LANGUAGE: its questions with their answers in de, fr, it or nl"
VERSION = debian_faq.VERSION
LICENSE = debian_faq.LICENSE

SHAPE = "question/answer"


def load(argument: str, root: Path) -> Iterator[Document]:
    """Yield the questions of one language in order. A section's number decides its split."""
    for section in debian_faq.load(argument, root):
        question, answer = _parts(section)
        if "?" in question and answer:
            turns = (("user", question), ("assistant", answer))
            yield chat(turns, SHAPE, section.name, section.key)


def left_out(argument: str, root: Path) -> dict[str, int]:
    """Count the sections whose title asks nothing."""
    sections = sum(1 for _ in debian_faq.load(argument, root))
    return {"sections whose title is no question": sections - sum(1 for _ in load(argument, root))}


def _parts(section: Document) -> tuple[str, str]:
    """Return a section's title, which may be of several lines, and what stands below it."""
    title, _, body = section.text.partition("\n\n")
    return " ".join(title.split()), body.strip()
