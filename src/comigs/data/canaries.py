"""Canaries: made-up documents that are put into clients' train text by coin flips, for audits.

All look alike and none means anything, so that one that was nowhere is a fair rival of one that was
learnt (1802.08232).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from comigs.data.corpus import Encoder, TokenStore
from comigs.data.prepare import ClientData, Texts
from comigs.seeds import generator

COPIES = (1, 4, 16)  # times that a canary is in its client's train text, where it is in
WORDS, SYLLABLES = 6, 3
CONSONANTS, VOWELS = "bcdfghjklmnprstvz", "aeiou"


@dataclass(frozen=True)
class Canary:
    """A canary is a made-up document, `copies` times in its client's train text or not at all."""

    copies: int
    text: str
    member: bool


def make_up(seed: int, client: str, count: int) -> list[Canary]:
    """Return `count` canaries of a client for each number in COPIES, with coin flips of their own.

    Texts and flips come from the seed: two audits with one seed plant the same.
    """
    canaries = []
    for copies in COPIES:
        for number in range(count):
            random = generator(seed, "canary", client, copies, number)
            words = []
            for _ in range(WORDS):
                consonants = random.integers(len(CONSONANTS), size=SYLLABLES)
                vowels = random.integers(len(VOWELS), size=SYLLABLES)
                pairs = zip(consonants, vowels, strict=True)
                words.append("".join(CONSONANTS[c] + VOWELS[v] for c, v in pairs))
            text = f"The secret words are {' '.join(words)}."
            canaries.append(Canary(copies, text, bool(random.integers(2))))
    return canaries


def planted(
    store: TokenStore, documents: Sequence[Sequence[int]], separator: int, seed: int, client: str
) -> TokenStore:
    """Return a store with documents between those that it has, each at a place drawn at random.

    documents: their tokens, without separators; as often as each is to be in it. num_bytes stays
    that of the text without them. The result is in memory.
    """
    # A document may come after any separator but the last: there it would have none before it.
    own = np.asarray(store.tokens)
    ends = np.flatnonzero(own[:-1] == separator) + 1
    places = generator(seed, "planted", client).integers(len(ends), size=len(documents))
    pieces, last = [], 0
    for number in np.argsort(places, kind="stable"):
        end = int(ends[places[number]])
        pieces += [own[last:end], np.array([*documents[number], separator], dtype=own.dtype)]
        last = end
    tokens = np.concatenate([*pieces, own[last:]])
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()
    return replace(
        store,
        tokens=tokens,
        num_documents=store.num_documents + len(documents),
        text_sha256=digest,
        tokens_sha256=digest,
    )


class PlantedTexts(Texts):
    """Planted texts are the texts of all clients, with canaries among their train documents."""

    def __init__(
        self, texts: Texts, canaries: Mapping[str, Sequence[Canary]], encoder: Encoder, seed: int
    ) -> None:
        """Begin with `texts`. canaries: by client. encoder: makes tokens of them."""
        super().__init__(texts._own.values(), "out" if texts._mixed else "in")
        self._canaries, self._tokens, self._seed = canaries, encoder, seed
        self._planted: dict[str, TokenStore] = {}

    def load(self, name: str) -> ClientData:
        """Return a client's data, with the canaries in it that are members."""
        data = super().load(name)
        if name not in self._planted:
            documents = []
            for canary in self._canaries[name]:
                if canary.member:
                    documents += self._tokens.encode([canary.text]) * canary.copies
            (own,) = data.train
            self._planted[name] = planted(own, documents, self._tokens.separator, self._seed, name)
        return replace(data, train=(self._planted[name],))
