"""A pinned base is what a federation's bundles say of the one base that its devices load."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from comigs.config import NAMED_BASES, BaseSection, Section


class PinnedBase(Section):
    """A pinned base is told from every other by its weights, and named for people.

    name: a name of ours or on the hub, or that of a folder at the operator's. dtype, tokenizer,
    weights: as in a config's [base]. fingerprint: sha256 of the tokenizer and of the weights as
    they are then held.
    """

    name: str
    dtype: Literal["float64", "float32", "bfloat16"]
    tokenizer: Literal["own", "gpt-2"]
    fingerprint: str
    # Bundles from before it was a choice say nothing of it, and their check is of what they say.
    weights: Literal["whole", "int8", "int4"] = Field(
        "whole", exclude_if=lambda weights: weights == "whole"
    )

    @property
    def has_public_name(self) -> bool:
        """Whether it can be loaded by its name on any machine."""
        return self.name in NAMED_BASES or "/" in self.name

    def differs(self, section: BaseSection, fingerprint: str) -> str:
        """Return what of a base is not as pinned, in a few words; "" where nothing is.

        section: as devices are told it, in which a folder goes by its name alone.
        """
        for field in ("name", "dtype", "tokenizer", "weights"):
            given, pinned = getattr(section, field), getattr(self, field)
            if given != pinned:
                return f'base.{field}: given "{given}", but pinned is "{pinned}"'
        if fingerprint != self.fingerprint:
            return f'base.name: "{self.name}" has other weights than those that are pinned'
        return ""
