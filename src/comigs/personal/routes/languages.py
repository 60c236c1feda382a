"""Function words: articles, pronouns, prepositions, conjunctions, auxiliaries.

They are a closed class, so that a list holds them. The lists are those of the Snowball project as
bm25s has them, for languages that write spaces between words.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from comigs.errors import require_extra

NAMES = {
    "da": "DANISH", "de": "GERMAN", "en": "EN_PLUS", "es": "SPANISH", "fr": "FRENCH",
    "it": "ITALIAN", "nl": "DUTCH", "no": "NORWEGIAN", "pt": "PORTUGUESE", "ru": "RUSSIAN",
    "sv": "SWEDISH", "tr": "TURKISH",
}  # fmt: skip
LEAST = 0.1  # of all words; a fifth to a half are function words of its own language
NO_LANGUAGE = "none"


@cache
def function_words() -> dict[str, frozenset[str]]:
    """Return language -> its function words. Raises UserError without the extra `routes`."""
    require_extra("routes", ("bm25s",), "comigs routes")
    from bm25s import stopwords

    return {
        code: frozenset(getattr(stopwords, f"STOPWORDS_{name}")) for code, name in NAMES.items()
    }


def language_of(words: Iterable[str]) -> str:
    """Return the language whose function words make up most of these words, in lower case.

    It is NO_LANGUAGE where they are less than LEAST of the words in every language.
    """
    own = [word for word in words if not word.isnumeric()]
    counts = {code: sum(map(known.__contains__, own)) for code, known in function_words().items()}
    best = max(counts, key=lambda code: counts[code])
    return best if counts[best] > LEAST * len(own) else NO_LANGUAGE
