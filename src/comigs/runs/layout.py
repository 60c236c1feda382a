"""The names that the files of a run have (docs/run-folder.md).

Nothing else in a run folder is opened, written or removed, whatever a file in it says.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from comigs.errors import UserError
from comigs.files import ClosedFolder

METRICS, TIMINGS = "metrics.jsonl", "timings.jsonl"
SUFFIX = ".safetensors"
PERSONAL = "personal"  # the one name that has no round: it is written once, at the end
SCRATCH, LOCK = ".scratch", ".lock"
TRACK = "track"  # what trackers write here (docs/track.md)
TENSORS = rf"(round-[0-9]{{4,}}\.\w+|{PERSONAL})\{SUFFIX}"
TEXTS = (
    r"(config\.toml|(env|checkpoint|summary|tasks)\.json|(metrics|timings)\.jsonl|report\.html"
    r"|audit\.(json|html)|privacy\.json|\.sum\.json|\.run-id|\.progress\.jsonl"
    r"|\.answer-[0-9]{4,})"
)
CLIENT = r"[^./][^/]*"
LEFT = re.compile(  # what a killed process may leave; older versions wrote no letters and digits
    rf"{TENSORS}|\.({TEXTS}|{TENSORS})(\.[0-9a-f]{{16}})?\.unfinished"
)


def is_tensor_file(name: str) -> bool:
    """Return whether a run may have tensors in a file of that name."""
    return re.fullmatch(rf"(clients/{CLIENT}|server)/{TENSORS}", name) is not None


def is_run(folder: ClosedFolder) -> bool:
    """Return whether a run was made in a folder. Raises UserError where its files are links."""
    return folder.has("checkpoint.json") and folder.has("config.toml")


def require_run(folder: ClosedFolder) -> None:
    """Raise UserError where there is no run in a folder, or where anything of it is a link."""
    if not is_run(folder):
        found = "no such run folder"
        if folder.path.exists():
            found = "not a run folder (it has no config.toml and checkpoint.json)"
        raise UserError(f"{folder.path}: {found}; start a run with: comigs run CONFIG")
    require_no_links(folder)


def files_of(folder: ClosedFolder) -> Iterator[str]:
    """Give the names of what is where a run has files, whether the run's own or not.

    Raises UserError where a folder of the run is a link.
    """
    clients = [f"clients/{name}" for name in folder.names("clients")]
    for place in ("", "server", *clients):
        for name in folder.names(place):
            yield f"{place}/{name}".removeprefix("/")


def require_no_links(folder: ClosedFolder) -> None:
    """Raise UserError where anything of a run is a link, before anything is written."""
    own = re.compile(
        rf"({TEXTS}|\{LOCK}|\{SCRATCH}|{TRACK}|server|clients|clients/{CLIENT}/privacy\.json)"
    )
    for name in files_of(folder):
        if own.fullmatch(name) or is_tensor_file(name):
            folder.refuse_link(name)


def remove_left(folder: ClosedFolder, kept: Collection[str]) -> None:
    """Remove what a killed process left. kept: files of the run, whose names may be the same."""
    for name in files_of(folder):
        if LEFT.fullmatch(name.rpartition("/")[2]) and name not in kept:
            folder.remove(name)
