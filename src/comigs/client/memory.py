"""This page says how training stays below `base.memory`: fewer windows at once, then recomputation.

Neither changes what is learnt: a step's gradient is gathered piece by piece, and a block that is
computed again comes out the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

from comigs.bases.load import Base
from comigs.client.estimate import bind_new_client, memory_needed, windows_at_once
from comigs.client.steps import MethodHooks, step
from comigs.config import Config
from comigs.data.batches import Batch
from comigs.errors import UserError
from comigs.experts.attach import Attachment
from comigs.processes import peak_memory
from comigs.seeds import generator
from comigs.slots import Shapes
from comigs.text import parsed_size, plural, size

ANY = "any"  # in place of a budget, where one is still to be chosen
# Times the estimate by which a process may come to more: states on their way to the disk, buffers
# of each thread. Seen: 1.01 with one client, 1.05 with four (docs/performance.md).
MARGIN = 1.05


@dataclass(frozen=True)
class Way:
    """A way is a config that trains the same in less memory. needed: a process's bytes."""

    config: Config
    needed: float

    @property
    def budget(self) -> str:
        """The smallest base.memory that allows it."""
        return f"{math.ceil(self.needed / 1e7) / 100:.2f}GB"

    def __str__(self) -> str:
        """Return the way in words."""
        windows = plural(windows_at_once(self.config), "window")
        return f"{windows} at once{', blocks recomputed' * self.config.base.recompute}"


def all_ways(
    config: Config, base: Base, shapes: Mapping[str, Shapes], attachment: Attachment
) -> list[Way]:
    """Return what a run with a budget may choose, from what needs most, and is fastest, on."""
    # What loading took is part of the process's peak, too, and no way makes it less.
    found, before = list[Way](), float(peak_memory())
    for recompute in sorted({config.base.recompute, True}):
        for windows in _fewer(windows_at_once(config)):
            tried = _smaller(config, windows, recompute)
            training = memory_needed(tried, base, shapes, attachment) / config.workers
            needed = max(MARGIN * training, before)
            if not found or needed < found[-1].needed:
                found.append(Way(tried, needed))
    return found


def _fewer(windows: int) -> list[int]:
    """Return into how large pieces a step is cut: 1 of so many windows, 2, 3, 4, 6, 8, 12, ..."""
    doublings = range(windows.bit_length() + 1)
    pieces = {1, *(2**n for n in doublings), *(3 * 2**n for n in doublings)}
    return sorted({math.ceil(windows / number) for number in pieces}, reverse=True)


def _smaller(config: Config, windows: int, recompute: bool) -> Config:
    # Windows that are only measured then need less than as many that are trained on.
    measured = min(config.evaluation.batch_size, windows)
    base = {"recompute": recompute, "memory": config.base.memory or ANY}
    changed = {
        "base": config.base.model_copy(update=base),
        "client": config.client.model_copy(update={"micro_batch_size": windows}),
        "evaluation": config.evaluation.model_copy(update={"batch_size": measured}),
    }
    return config.model_copy(update=changed)


def within_memory(
    config: Config, base: Base, shapes: Mapping[str, Shapes], attachment: Attachment
) -> Way | None:
    """Return the first way that stays below base.memory; None where no memory is given.

    Raises UserError, naming the smallest memory that would do, where none does.
    """
    if config.base.memory is None:
        return None
    allowed, possible = parsed_size(config.base.memory), all_ways(config, base, shapes, attachment)
    for way in possible:
        if way.needed <= (allowed or 0.0):
            return way
    least = possible[-1]
    raise UserError(
        f'base.memory: given "{config.base.memory}", but with {least} this run needs about '
        f'{size(least.needed)}; the smallest that would do is "{least.budget}"'
    )


def speed(way: Way, base: Base, shapes: Mapping[str, Shapes], attachment: Attachment) -> float:
    """Return the tokens a second of a way here and now: of one piece of a step, of random
    tokens. attachment: as the way has it.
    """
    config, windows = way.config, windows_at_once(way.config)
    state, settings = bind_new_client(config, base, shapes, attachment)
    vocabulary, length = base.encoder.vocabulary_size, config.data.sequence_length
    tokens = generator(config.seed, "estimate").integers(vocabulary, size=(windows, length))
    began = time.perf_counter()
    step(attachment, state, settings, MethodHooks(), ("experts",), Batch(tokens, tokens))
    seconds = time.perf_counter() - began
    attachment.unbind()
    return tokens.size / seconds
