"""A workplace is one base, for the clients of a process."""

from __future__ import annotations

from dataclasses import dataclass

from comigs.bases.load import Base
from comigs.config import Config
from comigs.experts.attach import Attachment, Layout
from comigs.methods.method import Method
from comigs.processes import SMALLER, free_at_once


@dataclass(frozen=True)
class Workplace:
    """A workplace is what the clients of one process take turns on: one base with experts attached.

    The attachment points at the tensors of whichever client is at work.
    """

    config: Config
    method: Method
    base: Base
    attachment: Attachment


def workplace(config: Config, method: Method, base: Base) -> Workplace:
    """Attach the experts that clients of a config have to a base; return where clients can work."""
    # What a block is computed from again lies between what it was made of, and is held longer: the
    # heap would have holes of megabytes a block.
    if config.base.memory and config.base.recompute:
        free_at_once(SMALLER)
    return Workplace(config, method, base, attach(config, method, base, config.base.recompute))


def attach(config: Config, method: Method, base: Base, recompute: bool = False) -> Attachment:
    """Put experts on a base as a method mixes them."""
    layout = Layout(
        summed=method.mixing == "sum",
        on_top=method.on_top,
        beside_others=method.beside_others(config),
    )
    return Attachment(base.model, base.architecture, config.experts, layout, recompute)
