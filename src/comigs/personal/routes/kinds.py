"""What kind of token each token of a document is: each has one kind, and one frequency.

A token is what its first character is that is no white space. A word is a run of letters and digits
with a letter in it. A token that holds one whole is a function word (languages.py), else a name,
else a content word; who reads a part of a word does not know yet which word it is, so that parts
are kinds of their own. A name has a capital inside a sentence; in German, where every noun has one,
a capital beyond its first letter.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from comigs.personal.routes.languages import NO_LANGUAGE, function_words, language_of
from comigs.runs.routes import FREQUENCIES, Kind

RUN, GAP = re.compile(r"[^\W_]+"), re.compile(r"\n\s*\n")
ENOUGH = 10  # words of a paragraph that can tell its language
ENDS = ".!?:\N{HORIZONTAL ELLIPSIS}\n\r"  # after which a sentence begins
FREQUENT, NOT_RARE = 0.5, 0.9  # of all tokens


@dataclass(frozen=True)
class Word:
    """A word is where a text has it, and in the language of its paragraph.

    A paragraph of few words, or in no language that is known, is in its document's.
    """

    text: str
    start: int
    end: int
    language: str

    @property
    def is_number(self) -> bool:
        """Whether it has digits only."""
        return self.text.isnumeric()


def kinds_of(pieces: Sequence[bytes]) -> tuple[list[Kind], list[Word]]:
    """Return the kind of each token of one document, and the document's words.

    pieces: the bytes that its tokens write, which may be parts of characters.
    """
    text = b"".join(pieces).decode(errors="surrogateescape")
    words = _words_of(text)

    # Each character knows the word it is in, each byte its character.
    word_at: list[Word | None] = [None] * len(text)
    for found in words:
        word_at[found.start : found.end] = [found] * len(found.text)
    sizes = [len(character.encode(errors="surrogateescape")) for character in text]
    ends = np.cumsum([0, *sizes])

    kinds, end = list[Kind](), 0
    for piece in pieces:
        begin, end = end, end + len(piece)
        # A character that began in the token before counts for both tokens.
        first = int(np.searchsorted(ends, begin, side="right")) - 1
        last = int(np.searchsorted(ends, end, side="left"))
        seen = (n for n in range(first, last) if not text[n].isspace())
        at = next(seen, None)
        if at is None:
            kinds.append("spaces")
            continue
        word = word_at[at]
        if word is None:
            kinds.append("punctuation")
        elif word.is_number:
            kinds.append("numbers")
        elif at > word.start or ends[at] < begin:
            kinds.append("inside words")
        elif ends[word.end] > end:
            kinds.append("beginnings of words")
        else:
            kinds.append(_kind_of_word(word, text))
    return kinds, words


def _words_of(text: str) -> list[Word]:
    """Return the words of a document."""
    found = list(RUN.finditer(text))
    whole, breaks = language_of(map(_lower, found)), [gap.start() for gap in GAP.finditer(text)]
    words = []
    for _, group in groupby(found, lambda word: bisect(breaks, word.start())):
        paragraph = list(group)
        own = NO_LANGUAGE
        if len(paragraph) >= ENOUGH:
            own = language_of(map(_lower, paragraph))
        language = whole if own == NO_LANGUAGE else own
        words += [Word(word[0], word.start(), word.end(), language) for word in paragraph]
    return words


def _lower(word: re.Match[str]) -> str:
    return word[0].lower()


def _kind_of_word(word: Word, text: str) -> Kind:
    """Return the kind of a whole word."""
    # A capital alone is a letter, as in "N units", though "n'" is a French word.
    one, language = word.text, word.language
    is_letter = len(one) == 1 and one.isupper() and (language, one) != ("en", "I")
    known = language != NO_LANGUAGE and one.lower() in function_words()[language]
    if known and not is_letter:
        return "function words"
    capital = any(map(str.isupper, one[1:] if language == "de" else one))
    return "names" if capital and not _begins_sentence(text, word.start) else "content words"


def _begins_sentence(text: str, start: int) -> bool:
    """Return whether nothing of a sentence is before a place."""
    # Quotes, brackets and bullets belong to neither the sentence before nor the one behind.
    while start > 0 and text[start - 1] not in ENDS and _is_between(text[start - 1]):
        start -= 1
    return start == 0 or text[start - 1] in ENDS


def _is_between(character: str) -> bool:
    return character.isspace() or unicodedata.category(character).startswith("P")


def frequencies_of(ids: NDArray[np.int64]) -> list[str]:
    """Return for each token of a text how frequent it is there.

    The tokens of the vocabulary are lined up by how often they occur: those that make up the first
    half of the text are frequent, those that make up its last tenth are rare.
    """
    found, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
    order = np.lexsort((found, -counts))
    before = np.cumsum(counts[order]) - counts[order]
    levels = np.empty(len(found), dtype=np.int64)
    levels[order] = np.searchsorted([FREQUENT * len(ids), NOT_RARE * len(ids)], before, "right")
    return [FREQUENCIES[level] for level in levels[inverse]]
