"""This module says what settings are compared against: one of them for all, or for each the one
of a name that is most like it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from comigs.errors import UserError, nearest
from comigs.experiments.compare.settings import Dataset, Setting


@dataclass(frozen=True)
class Baseline:
    """A baseline is the setting called `name` where axis is None. Else each setting has its own:
    `name` on this axis, and on all others as it is, or on most of them.
    """

    name: str
    axis: str | None = None

    def is_baseline(self, setting: Setting) -> bool:
        """Return whether others are compared against this one."""
        if self.axis is None:
            return setting.name == self.name
        return setting.place.get(self.axis) == self.name

    def among(self, settings: Sequence[Setting], setting: Setting) -> Setting | None:
        """Return the baseline of a setting: of those there are, the one that shares most with it.

        None where two share as many, where there is none, and for a baseline itself.
        """
        if self.is_baseline(setting):
            return None
        alike: dict[int, list[Setting]] = {}  # by how many axes they share
        for known in filter(self.is_baseline, settings):
            shared = len(known.place.items() & setting.place.items())
            alike.setdefault(shared, []).append(known)
        nearest = alike[max(alike)] if alike else []
        return nearest[0] if len(nearest) == 1 else None

    def also_different(self, setting: Setting, baseline: Setting) -> list[str]:
        """Return the axes in which a setting differs from its own baseline beside this one."""
        if self.axis is None:
            return []
        others = {**setting.place, self.axis: self.name}
        return [axis for axis, value in others.items() if baseline.place[axis] != value]

    @property
    def words(self) -> str:
        """What stands after "compared against"."""
        return self.name if self.axis is None else f"{self.name} with most else the same"


def baseline_named(name: str, datasets: Sequence[Dataset]) -> Baseline:
    """Return a setting by its name, else by a value of an axis, else by a method that only one
    setting has.

    Raises UserError that names what there is.
    """
    settings = [s for dataset in datasets for s in dataset.settings]
    names = list(dict.fromkeys(s.name for s in settings))
    wanted = name.replace("/", ", ")
    if wanted in names:
        return Baseline(wanted)

    # A value of an axis stands for one setting among those that share all other values.
    places = [place for s in settings for place in s.place.items()]
    axes = list(dict.fromkeys(axis for axis, value in places if value == name))
    if len(axes) == 1:
        return Baseline(name, axes[0])
    of_method = list(dict.fromkeys(s.name for s in settings if s.method == name))
    if len(of_method) == 1:
        return Baseline(of_method[0])
    if axes or of_method:
        known = "; ".join(of_method or names)
        raise UserError(f'--baseline: "{name}" can mean several settings; say which: {known}')
    close = nearest(name, [*names, *(value for _, value in places)])
    known = "; ".join(names)
    raise UserError(f'--baseline: no setting "{name}" here.{close} There are: {known}')
