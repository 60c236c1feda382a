"""Which text a step learns from: drawn from (seed, client, what for, number) alone, whatever was
drawn before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from comigs.config import ClientSection, Config
from comigs.data.batches import Batch, fold_windows, sample_windows
from comigs.data.prepare import ClientData
from comigs.errors import UserError
from comigs.seeds import generator

Level = Literal["experts", "router"]  # the lower and the upper one


def batch_for(
    level: Level, number: int, local_steps: int, settings: ClientSection, length: int,
    random_for: Callable[[str, int], np.random.Generator], data: ClientData,
) -> Batch:  # fmt: skip
    """Batch `number` (from 0) of the level, after `local_steps` local steps of the run.

    Cross-fitting: between two router phases the experts see train without one fold, which is then
    the router's.
    """
    source = "train" if level == "experts" else settings.router_data
    label = "router train" if level == "router" and source == "train" else source
    random = random_for(label, number)
    if settings.router_data == "crossfit":
        phases = local_steps // settings.router_every - (
            level == "router"
        )  # before the steps this batch belongs to
        fold, inside = phases % settings.folds, level == "router"
        return fold_windows(
            data.train, random, settings.batch_size, length, fold, settings.folds, inside
        )
    return sample_windows(
        data.train if source == "train" else data.valid, random, settings.batch_size, length
    )


def probe_windows(
    config: Config, client: str, data: ClientData, round: int, num_windows: int
) -> list[Batch]:
    """The sample of valid on which a client compares models in a round: the same for every
    model.
    """
    random = generator(config.seed, "probe", client, round)
    return [sample_windows(data.valid, random, num_windows, config.data.sequence_length)]


def check_text(client: str, data: ClientData, settings: ClientSection, length: int) -> None:
    """Raises UserError where a fold of train would be shorter than one window."""
    need, shortest = length + 1, min(store.num_tokens for store in data.train)
    if settings.router_data == "crossfit" and shortest // settings.folds < need:
        most = shortest // need
        raise UserError(
            f"client.folds: given {settings.folds}, but client {client} has {shortest:,} tokens to train on; a fold "
            f'needs {need} at least. Use {f"at most {most}, or " if most > 1 else ""}client.router_data = "train"'
        )
