"""What settings are compared against: one of them for all, or for each the one that differs from it
in one axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from comigs.errors import UserError, nearest
from comigs.experiments.compare.settings import Dataset, Setting


@dataclass(frozen=True)
class Baseline:
    """axis None: the setting called `name`. Else each setting's own: `name` on this axis, all other
    axes as in it.
    """

    name: str
    axis: str | None = None

    def is_baseline(self, setting: Setting) -> bool:
        """Whether others are compared against this one."""
        return (
            setting.name == self.name
            if self.axis is None
            else setting.place.get(self.axis) == self.name
        )

    def among(self, settings: Sequence[Setting], setting: Setting) -> Setting | None:
        """The baseline of a setting; None where it is not there, and for a baseline itself."""
        if self.is_baseline(setting):
            return None
        wanted = None if self.axis is None else {**setting.place, self.axis: self.name}
        return next(
            (s for s in settings if self.is_baseline(s) and wanted in (None, s.place)), None
        )

    @property
    def words(self) -> str:
        """For "compared against ..."."""
        return self.name if self.axis is None else f"{self.name} with all else the same"


def baseline_named(name: str, datasets: Sequence[Dataset]) -> Baseline:
    """A setting's name, else a value of an axis, else a method that one setting has.

    Raises UserError that names what there is.
    """
    settings = [s for dataset in datasets for s in dataset.settings]
    names = list(dict.fromkeys(s.name for s in settings))
    wanted = name.replace("/", ", ")
    if wanted in names:
        return Baseline(wanted)
    axes = list(
        dict.fromkeys(axis for s in settings for axis, value in s.place.items() if value == name)
    )
    if len(axes) == 1:
        return Baseline(name, axes[0])
    of_method = list(dict.fromkeys(s.name for s in settings if s.method == name))
    if len(of_method) == 1:
        return Baseline(of_method[0])
    if axes or of_method:
        raise UserError(
            f'--baseline: "{name}" can mean several settings; say which: {"; ".join(of_method or names)}'
        )
    known = [*names, *(value for s in settings for value in s.place.values())]
    raise UserError(
        f'--baseline: no setting "{name}" here.{nearest(name, known)} There are: {"; ".join(names)}'
    )
