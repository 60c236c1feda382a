"""This source is chatterbot-corpus: questions and answers by topic, in English and other languages.

It is read from the package of that name, which is installed apart. The first two lines of a
conversation are a question and its answer; what else stands below, another answer or the talk going
on, is left out, since the corpus does not say which of the two it is.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from comigs.data.document import Document, chat
from comigs.data.files import reading
from comigs.errors import UserError, nearest

SUMMARY = "chatterbot:LANGUAGE:TOPIC+TOPIC: questions with answers, as english:coding+computers"
VERSION = "1.3.3"
LICENSE = "BSD-3-Clause; needs `pip install --no-deps chatterbot-corpus`"

PACKAGE = "chatterbot_corpus"
SHAPE = "question/answer"


def load(argument: str, root: Path) -> Iterator[Document]:
    """Yield the questions of some topics, in order. Raises UserError."""
    for file in _files(argument):
        for number, lines in enumerate(_conversations(file), start=1):
            asked, answer, *_ = (*map(str, lines), "", "")
            if asked.strip() and answer.strip():
                turns = (("user", asked.strip()), ("assistant", answer.strip()))
                yield chat(turns, SHAPE, f"{file.stem} {number}")


def left_out(argument: str, root: Path) -> dict[str, int]:
    """Count the lines of conversations below the first question and answer."""
    lines = sum(len(talk) for file in _files(argument) for talk in _conversations(file))
    kept = 2 * sum(1 for _ in load(argument, root))
    return {"lines below a first answer, or without one": lines - kept}


def _files(argument: str) -> list[Path]:
    """Return the files of the topics that are asked for. Raises UserError."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(
            f"chatterbot:{argument}: the corpus is not installed; "
            "run: pip install --no-deps chatterbot-corpus"
        )
    # A folder is a language and a file in it a topic, so the package itself says which there are.
    data = Path(spec.origin).parent / "data"
    language, _, topics = argument.partition(":")
    languages = sorted(folder.name for folder in data.iterdir() if folder.is_dir())
    if language not in languages:
        raise UserError(
            f'chatterbot:{argument}: no language "{language}"; there are: {", ".join(languages)}.'
            f"{nearest(language, languages)}"
        )
    known = sorted(file.stem for file in (data / language).glob("*.yml"))
    found = []
    for topic in topics.split("+"):
        if topic not in known:
            raise UserError(
                f'chatterbot:{argument}: no topic "{topic}"; there are: {", ".join(known)}.'
                f"{nearest(topic, known)}"
            )
        found.append(data / language / f"{topic}.yml")
    return found


def _conversations(file: Path) -> list[list[Any]]:
    """Return the conversations of one topic, each a list of lines. Raises UserError."""
    import yaml

    with reading(file):
        text = file.read_text(encoding="utf-8")
    try:
        talks = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        return [_lines(talk) for talk in talks["conversations"]]
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{file}: is no conversations in YAML: {type(error).__name__}") from None


def _lines(talk: list[Any]) -> list[Any]:
    """Return the lines of a conversation that hold something."""
    return [line for line in talk if line is not None]
