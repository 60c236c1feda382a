"""This module compares an answer with the right one: exact match, token F1, and ROUGE-L.

All three read words by rules for every language. SQuAD's own rule knows ASCII punctuation alone,
and that of `rouge_score` drops every letter that is not from a to z. Where a script has no spaces
between words, each character is a word, as MLQA has it for Chinese.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from functools import cache
from typing import Any

import regex

ARTICLES = regex.compile(r"\b(a|an|the)\b")
NO_SPACES = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
# Letters with their marks, which many vowels are, and the joiners between them.
LETTERS = r"[\w\p{M}\u200C\u200D]"
WORD = regex.compile(rf"{NO_SPACES}\p{{M}}*|[{LETTERS}--{NO_SPACES}]+", regex.V1)
PART = regex.compile(rf"{NO_SPACES}\p{{M}}*|[\S--{NO_SPACES}]+", regex.V1)


def normalized(answer: str) -> str:
    """Return an answer as SQuAD compares it (Rajpurkar et al. 2016, their evaluation script).

    That is in lower case, without punctuation and English articles, with single spaces. Punctuation
    is that of every script, as in MLQA (Lewis et al. 2020), beside ASCII's symbols.
    """
    lower = unicodedata.normalize("NFC", answer).lower()
    plain = "".join(letter for letter in lower if not _is_punctuation(letter))
    return " ".join(ARTICLES.sub(" ", plain).split())


def exact_match(answer: str, right: str) -> float:
    """Return 1 where both are the same once normalized, else 0."""
    return float(normalized(answer) == normalized(right))


def token_f1(answer: str, right: str) -> float:
    """Return the F1 of the words of an answer, as SQuAD counts them; 1 where neither has any.

    What stands between spaces is a word, or a character where there are none.
    """
    words, wanted = PART.findall(normalized(answer)), PART.findall(normalized(right))
    if not words or not wanted:
        return float(words == wanted)
    common = (Counter(words) & Counter(wanted)).total()
    return 2 * common / (len(words) + len(wanted))


def rouge_l(answer: str, right: str) -> float:
    """Return the F1 of the longest common subsequence of words (ROUGE-L; Lin 2004).

    Words are letters and digits of any script with their marks, in lower case and not stemmed.
    """
    return float(_scorer().score(right, answer)["rougeL"].fmeasure)


class UnicodeWords:
    """This tokenizer gives `rouge_score` the words of any language."""

    def tokenize(self, text: str) -> list[str]:
        """Return the words of a text."""
        words: list[str] = WORD.findall(unicodedata.normalize("NFC", text).lower())
        return words


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=UnicodeWords())


def _is_punctuation(letter: str) -> bool:
    category = unicodedata.category(letter)
    return category.startswith("P") or (letter.isascii() and category.startswith("S"))
