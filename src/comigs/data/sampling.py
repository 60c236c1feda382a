"""This module says which text a step learns from.

A batch is drawn from (seed, client, what for, number) alone, whatever was drawn before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from comigs.config import ClientSection, Config
from comigs.data.batches import Batch, Fold, fold_windows, sample_windows
from comigs.data.examples import ExampleStore
from comigs.data.prepare import ClientData
from comigs.errors import UserError
from comigs.seeds import generator

Level = Literal["experts", "router"]  # the lower and the upper level of the bi-level method
RouterSplit = Literal["valid", "train", "crossfit"]


@dataclass(frozen=True)
class BatchSource:
    """A batch source is what a client's batches are drawn from.

    `length` is that of a window in tokens. `random_for` gives the generator of a purpose and a
    number.
    """

    data: ClientData
    settings: ClientSection
    length: int
    random_for: Callable[[str, int], np.random.Generator]

    def batch(self, level: Level, number: int, local_steps: int) -> Batch:
        """Return batch `number` (from 0) of a level, after `local_steps` local steps of the run."""
        settings, is_router = self.settings, level == "router"
        split = router_split(settings) if is_router else "train"
        purpose = "router train" if is_router and split == "train" else split
        random = self.random_for(purpose, number)
        if settings.router_data == "crossfit":
            # Between two router phases the experts see train without one fold, which is then the
            # router's. A router's batch comes after the steps of its phase, so it counts one less.
            phase = local_steps // settings.router_every - is_router
            fold = Fold(phase % settings.folds, settings.folds, inside=is_router)
            return fold_windows(self.data.train, random, settings.batch_size, self.length, fold)
        stores = self.data.train if split == "train" else self.data.valid
        return sample_windows(stores, random, settings.batch_size, self.length)


def router_split(settings: ClientSection) -> RouterSplit:
    """Return the text that a router's phases read."""
    if settings.router_data in ("valid", "crossfit"):
        return settings.router_data
    return "train"


def probe_windows(
    config: Config, client: str, data: ClientData, round: int, num_windows: int
) -> list[Batch]:
    """Return the sample of valid on which a client compares all models in a round, if any."""
    if not num_windows:
        return []
    random = generator(config.seed, "probe", client, round)
    drawn = sample_windows(data.valid, random, num_windows, config.data.sequence_length)
    return drawn.pieces(config.evaluation.batch_size)


def check_text(client: str, data: ClientData, settings: ClientSection, length: int) -> None:
    """Refuse a text whose folds would be shorter than one window. Raises UserError."""
    if settings.router_data != "crossfit":
        return
    for store in data.train:
        places, more = store.num_places(length)
        what = "windows of chats" if isinstance(store, ExampleStore) else "tokens"
        if places // settings.folds <= more:
            most = places // (more + 1)
            fewer = f"at most {most}, or " if most > 1 else ""
            raise UserError(
                f"client.folds: given {settings.folds}, but client {client} has {places:,} {what} "
                f"to train on; a fold needs {more + 1} at least. "
                f'Use {fewer}client.router_data = "train"'
            )
