"""From the weights of a text's tokens to what people see: groups, extremes, a passage.

T tokens, L blocks, V tokens of the vocabulary that occur.
"""

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comigs.bases.load import Base
from comigs.personal.model import PersonalModel
from comigs.personal.routes.kinds import frequencies_of, kinds_of
from comigs.personal.routes.weights import is_beside_others, read_weights, shared_experts
from comigs.personal.serve.text import Vocabulary
from comigs.runs.folder import RunFolder
from comigs.runs.routes import (
    FREQUENCIES,
    KINDS,
    Extremes,
    Group,
    Kind,
    Ranked,
    RoutedToken,
    Routes,
)

MOST = 1 << 20  # tokens of a text that are read; the weights of 30 blocks take 120 MB then
SHOWN = 8  # tokens at either end of a block's ranking
SHORT = 1000  # tokens below which a token counts in a ranking that is read once; else OFTEN times
OFTEN = 3
DIGITS = 6  # of a weight


@dataclass(frozen=True)
class ReadText:
    """A text as tokens. name: "test" or a file's name. streams: each begins with a separator."""

    name: str
    streams: Sequence[NDArray[Any]]

    def first(self, most: int) -> ReadText:
        """Return the same text, and no more than its first tokens."""
        kept, left = [], most + 1
        for stream in self.streams:
            if left > 1:
                kept.append(stream[:left])
                left -= len(kept[-1]) - 1
        return ReadText(self.name, kept)

    def read_ids(self) -> NDArray[np.int64]:
        """Return the tokens that a model reads (T,): all but the last of each stream."""
        return np.concatenate([stream[:-1] for stream in self.streams]).astype(np.int64)


def describe(folder: RunFolder, base: Base, client: str, text: ReadText, tokens: int) -> Routes:
    """Return where a text's tokens go in a client's own model, with its first `tokens` as they are.

    base: the run's own. Raises UserError where nothing is routed.
    """
    # A text without end is read as far as its weights fit into memory.
    shared = shared_experts(folder, client)
    text = text.first(MOST)
    ids, config = text.read_ids(), folder.config()
    with closing(PersonalModel(folder, client, base)) as model:
        weights_TL = read_weights(model, text.streams, shared)
    # From here on, it is about tokens and their weights only.
    vocabulary = Vocabulary(base.tokenizer)
    kinds, languages = _kinds(ids, vocabulary)
    return Routes(
        run=folder.path.resolve().name,
        method=config.method,
        base=base.title,
        seed=config.seed,
        client=client,
        routing=config.experts.routing,
        beside_others=is_beside_others(folder, client),
        text=text.name,
        languages=languages,
        every=_group("all", weights_TL),
        kinds=_groups(KINDS, kinds, weights_TL),
        frequencies=_groups(FREQUENCIES, frequencies_of(ids), weights_TL),
        extremes=_extremes(ids, weights_TL, vocabulary),
        passage=_passage(ids[:tokens], kinds, weights_TL, vocabulary),
    )


def _kinds(ids: NDArray[np.int64], vocabulary: Vocabulary) -> tuple[list[Kind], dict[str, int]]:
    """Return the kind of each token, and how many words there are in each language."""
    special, kinds, languages = vocabulary.special, list[Kind](), Counter[str]()
    # What stands between two separators is a document.
    for apart, group in groupby(ids.tolist(), special.__contains__):
        document = list(group)
        if apart:
            kinds += ["separators"] * len(document)
            continue
        found, words = kinds_of([vocabulary.bytes_of(id) for id in document])
        kinds += found
        languages.update(word.language for word in words if not word.is_number)
    return kinds, dict(languages.most_common())


def _groups(
    names: Sequence[str], of_token: Sequence[str], weights_TL: NDArray[np.float32]
) -> list[Group]:
    """Return each of these groups of tokens, in this order."""
    own = np.array(of_token)
    return [_group(name, weights_TL[own == name]) for name in names]


def _group(name: str, weights_TL: NDArray[np.float32]) -> Group:
    """Return the group of these tokens."""
    if not len(weights_TL):
        return Group(name=name, tokens=0, mean=[], deviation=[])
    mean, deviation = weights_TL.mean(0, np.float64), weights_TL.std(0, np.float64)
    return Group(
        name=name, tokens=len(weights_TL), mean=_rounded(mean), deviation=_rounded(deviation)
    )


def _extremes(
    ids: NDArray[np.int64], weights_TL: NDArray[np.float32], vocabulary: Vocabulary
) -> list[Extremes]:
    """Return by block the tokens of the vocabulary with the outermost mean weights."""
    found, inverse, times = np.unique(ids, return_inverse=True, return_counts=True)
    sums_VL = np.zeros((len(found), weights_TL.shape[1]))
    np.add.at(sums_VL, inverse, weights_TL)
    means_VL = sums_VL / times[:, None]

    # One reading says little of a token where there are many others.
    known = np.flatnonzero(times >= (OFTEN if len(ids) >= SHORT else 1))
    shown = min(SHOWN, len(known) // 2)
    extremes = []
    for means_V in means_VL.T:
        # Where a router is closed, or weighs no tokens, none is more of either side.
        order = known[np.argsort(means_V[known], kind="stable")]
        if not shown or means_V[order[-1]] - means_V[order[0]] < 10**-DIGITS:
            extremes.append(Extremes(most_generalist=[], most_specialist=[]))
            continue
        ranked = []
        for number in (*order[: -shown - 1 : -1], *order[:shown]):
            raw = vocabulary.bytes_of(int(found[number])).decode(errors="replace")
            weight = round(float(means_V[number]), DIGITS)
            ranked.append(Ranked(text=raw, times=int(times[number]), weight=weight))
        both = Extremes(most_generalist=ranked[:shown], most_specialist=ranked[shown:])
        extremes.append(both)
    return extremes


def _passage(
    ids: NDArray[np.int64],
    kinds: Sequence[Kind],
    weights_TL: NDArray[np.float32],
    vocabulary: Vocabulary,
) -> list[RoutedToken]:
    """Return these tokens, the first of the text, as they stand."""
    texts = texts_of([vocabulary.bytes_of(int(id)) for id in ids])
    passage = []
    for text, kind, weights in zip(texts, kinds, weights_TL, strict=False):
        passage.append(RoutedToken(text=text, kind=kind, weights=_rounded(weights)))
    return passage


def texts_of(pieces: Sequence[bytes]) -> list[str]:
    """Return the text of each token; a character belongs to the token that completes it."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return [decoder.decode(piece) for piece in pieces]


def _rounded(weights: NDArray[Any]) -> list[float]:
    return [round(float(weight), DIGITS) for weight in weights]
