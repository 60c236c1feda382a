"""How many tensors of each role clients hold, from the headers of their safetensors files.

No tensor is loaded.
"""

from __future__ import annotations

import os
from collections import defaultdict
from fnmatch import fnmatch
from pathlib import Path

from comigs.errors import UserError
from comigs.files import ClosedFolder
from comigs.runs.json_lines import parse_json
from comigs.runs.metrics import Amount
from comigs.slots import Slot


def held_by_role(run_folder: Path) -> dict[str, Amount]:
    """Return role -> what all clients together hold by now; it is empty where there is no file.

    Raises UserError that names a file that cannot be read.
    """
    totals: dict[str, Amount] = defaultdict(Amount)
    folder = ClosedFolder(run_folder)
    for client in folder.names("clients"):
        # The personal model of a finished run goes before what is left of its rounds.
        place = f"clients/{client}"
        found = [
            name for name in folder.names(place) if fnmatch(name, "round-*.experts.safetensors")
        ]
        found += [name for name in folder.names(place) if name == "personal.safetensors"]
        if not found:
            continue
        name = f"{place}/{found[-1]}"
        for tensor, amount in _header(folder, name).items():
            try:
                totals[Slot.parse(tensor).role] += amount
            except ValueError as error:
                raise UserError(f"{run_folder / name}: {error}") from None
    return dict(totals)


def _header(folder: ClosedFolder, name: str) -> dict[str, Amount]:
    """Return tensor name -> its amount."""
    # The file starts with 8 bytes of length (little endian), then that much JSON.
    try:
        with folder.reading(name) as file:
            length = int.from_bytes(file.read(8), "little")
            if length > os.fstat(file.fileno()).st_size:
                raise ValueError("header longer than the file")
            header = parse_json(file.read(length))
        amounts = {}
        for key, tensor in header.items():
            if key != "__metadata__":
                start, end = tensor["data_offsets"]
                amounts[key] = Amount(slots=1, bytes=end - start)
        return amounts
    except UserError:
        raise
    except FileNotFoundError:
        return {}  # a live run has just replaced it by the next round's
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{folder.path / name}: cannot be read as safetensors: {error}") from None
