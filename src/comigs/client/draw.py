"""Which text a step learns from: drawn from (seed, client, what for, number) alone, whatever was drawn before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from comigs.client.steps import Batch, Group
from comigs.config import ClientSection, Config
from comigs.data.batches import fold_windows, sample_windows
from comigs.data.corpus import TokenStore
from comigs.data.prepare import ClientData
from comigs.errors import UserError
from comigs.seeds import generator


def batch_for(
    level: Group, number: int, local_steps: int, settings: ClientSection, length: int,
    random_for: Callable[[str, int], np.random.Generator], data: ClientData,
) -> Batch:  # fmt: skip
    """Batch `number` (from 0) of the level, after `local_steps` local steps of the run.

    Cross-fitting: between two router phases the experts see train without one fold, which is then the router's.
    """
    source = "train" if level == "experts" else settings.router_data
    label = "router train" if level == "router" and source == "train" else source
    random = random_for(label, number)
    if settings.router_data == "crossfit":
        phases = local_steps // settings.router_every - (level == "router")  # before the steps this batch belongs to
        fold, inside = phases % settings.folds, level == "router"
        return fold_windows(data.train, random, settings.batch_size, length, fold, settings.folds, inside)
    stores = data.train if source == "train" else first_part(data.valid, settings.valid_share, length)
    return sample_windows(stores, random, settings.batch_size, length)


def probe_windows(config: Config, client: str, data: ClientData, round: int, num_windows: int) -> list[Batch]:
    """The sample of valid on which a client compares models in a round: the same for every model."""
    random = generator(config.seed, "probe", client, round)
    return [sample_windows(data.valid, random, num_windows, config.data.sequence_length)]


def first_part(stores: Sequence[TokenStore], share: float, length: int) -> Sequence[TokenStore]:
    """The stores cut to their first `share` of tokens, but to no less than one window."""
    if share == 1:
        return stores
    return [replace(s, tokens=s.tokens[: max(length + 1, round(share * len(s.tokens)))]) for s in stores]


def check_text(client: str, data: ClientData, config: Config) -> None:
    """Raises UserError where a fold of train would be shorter than one window."""
    settings, need = config.client, config.data.sequence_length + 2
    shortest = min(store.num_tokens for store in data.train)
    if settings.router_data == "crossfit" and shortest // settings.folds < need:
        raise UserError(
            f"client.folds: given {settings.folds}, but client {client} has {shortest:,} tokens to train on; a fold "
            f'needs {need} at least. Use at most {max(1, shortest // need)}, or client.router_data = "train"'
        )
