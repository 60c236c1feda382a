"""This module keeps finished runs in packed form. It needs no pandas, and removes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from comigs.errors import UserError
from comigs.experiments.compare.discover import SWEEP, common_folder, find_runs, has_begun
from comigs.experiments.packed import write_packed
from comigs.experiments.sweep.spec import read_sweep, to_toml
from comigs.files import command, write_whole


def pack_runs(paths: Sequence[Path], out: Path | None = None) -> tuple[Path, int]:
    """Write every run in or below `paths` in packed form into `out`, by default the folder that
    holds them; return that folder and the number of runs.

    Raises UserError where a run is not finished, or packed runs are in the folder already.
    """
    runs = [one.run for one in find_runs(paths)]
    unfinished = [run for run in runs if not run.finished]
    if unfinished:
        folder = unfinished[0].folder
        raise UserError(f"{folder}: not finished; go on with: {command('resume', folder)}")
    home = paths[0] if len(paths) == 1 and has_begun(paths[0]) else common_folder(paths)
    folder = out or home
    write_packed(runs, home, folder)
    # A sweep's axes, their order and its baseline are in its file, whose paths are relative.
    if folder != home and (home / SWEEP).is_file() and not (folder / SWEEP).exists():
        text = to_toml(read_sweep(home / SWEEP), home / SWEEP, folder)
        write_whole(folder / SWEEP, lambda file: file.write_text(text, encoding="utf-8"))
    return folder, len(runs)
