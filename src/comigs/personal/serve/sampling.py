"""The next token of a row, from its logits. V vocabulary."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from comigs.personal.serve.jobs import Settings

HEAD = 256  # so many of the likeliest tokens nearly always hold the mass that `top_p` wants


COLDEST = 1e-5  # a lower temperature is as good as 0, and logits over it are no numbers


def choose(logits_V: Tensor, settings: Settings, random: np.random.Generator) -> int:
    """Return the likeliest token, or one drawn with one number from `random`.

    The draw goes along the vocabulary, not along the ranking: two tokens that are as likely may
    swap their ranks by a rounding error, and the text would then depend on who else is in the
    batch.
    """
    if settings.temperature < COLDEST:
        return int(logits_V.argmax())
    logits_V = logits_V.double() / settings.temperature
    probabilities_V = logits_V.softmax(dim=-1)
    if settings.top_p < 1:
        least = _least_probability(probabilities_V, settings.top_p)
        probabilities_V = probabilities_V.masked_fill(probabilities_V < least, 0)
    total_V = probabilities_V.cumsum(dim=-1)
    drawn = random.random() * float(total_V[-1])
    at = int(torch.searchsorted(total_V, total_V.new_tensor(drawn), right=True))
    return min(at, int(probabilities_V.nonzero()[-1]))


def _least_probability(probabilities_V: Tensor, top_p: float) -> float:
    """Return the probability of the last token that is needed for a mass of `top_p`, the likeliest
    first.
    """
    size = len(probabilities_V)
    for count in (min(HEAD, size), size):
        likeliest = probabilities_V.topk(count).values
        mass = likeliest.cumsum(dim=-1)
        if float(mass[-1]) >= top_p or count == size:
            break
    needed = int((mass < top_p).sum())
    return float(likeliest[min(needed, count - 1)])


def log_probabilities(
    logits_V: Tensor, token: int, alternatives: int
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Return the log probability of a token in nats, and the likeliest tokens with theirs.

    Both are the model's own, before temperature and top_p.
    """
    logprobs_V = logits_V.log_softmax(dim=-1)
    best = logprobs_V.topk(alternatives)
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return float(logprobs_V[token]), top
