"""Whoever opens a run folder may not be who made it, and has a say of their own.

A run says what was run. Where files outside of it go, and whose code runs, is its reader's to say.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from comigs.config import Config, DataSection
from comigs.data.corpus import holds_stores
from comigs.errors import UserError

ALLOW = "--allow-code"


@dataclass(frozen=True)
class Reader:
    """A reader opens a run, and says what the run's config cannot say for them.

    allow_code: a method of the run's maker's, which is package.module, may be imported. cache: the
    folder of the reader's tokens; None: the run's `data.cache` where the reader has tokens there
    already, else the default one.
    """

    allow_code: bool = False
    cache: Path | None = None

    @classmethod
    def of(cls, words: Sequence[str]) -> Reader:
        """Return the reader that `RunFolder.words` told another process of."""
        cache, *switches = words
        return cls(ALLOW in switches, Path(cache))

    def read(self, config: Config, run: Path) -> Config:
        """Return a run's config as this reader lets it have its way.

        Raises UserError where it asks for code that the reader does not allow.
        """
        if "." in config.method and not self.allow_code:
            raise UserError(
                f'{run}: method: "{config.method}" is code that is no part of comigs, and a run '
                f"folder may be somebody else's; if you trust whoever made it: {ALLOW}"
            )
        cache = self.cache
        if cache is None and not _is_own(config.data.cache, run):
            cache = DataSection().cache
        if cache is None:
            return config
        data = config.data.model_copy(update={"cache": cache})
        return config.model_copy(update={"data": data})


ANYBODY = Reader()  # a reader who says nothing


def _is_own(cache: Path, run: Path) -> bool:
    """Return whether this user has tokens in a folder, which is not a part of the run."""
    try:
        whole = cache.resolve()
        return (
            not whole.is_relative_to(run.resolve())
            and whole.stat().st_uid == os.getuid()
            and holds_stores(whole)
        )
    except OSError:
        return False
