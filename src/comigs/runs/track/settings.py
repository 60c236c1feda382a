"""What trackers are told of a run's config: numbers, and words that are ours."""

from __future__ import annotations

from typing import Any

from comigs.config import Config, dotted
from comigs.config.base import NAMED_BASES

# Every text in these sections is one of a few words that the config allows.
SECTIONS = ("experts", "client", "evaluation", "participation", "upload")
NUMBERS = ("seed", "rounds")


def settings_of(config: Config) -> dict[str, Any]:
    """Return the settings of a run by their names, as `client.lr`, without anything private.

    Names, paths, texts of clients, what is called by its maker, and where curves go are left out.
    """
    tree = config.model_dump(mode="json", include={*SECTIONS, *NUMBERS}, exclude_none=True)
    settings = dict(dotted(tree)) | {"clients": len(config.clients)}

    # In these sections a text may say anything, so only numbers are told.
    others = dotted(config.model_dump(mode="json", include={"data", "options"}))
    settings |= {name: value for name, value in others if isinstance(value, int | float)}

    # A method or a base of somebody's own has a name of somebody's own.
    if "." not in config.method:
        settings["method"] = config.method
    if config.base.name in NAMED_BASES:
        settings["base.name"] = config.base.name
    return settings
